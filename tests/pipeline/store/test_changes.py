from datetime import datetime

import pyarrow as pa
import pytest
from pyarrow import parquet

from longvlm.pipeline.store.changes import ChangeCriteria, compare
from longvlm.pipeline.store.look import PROVED
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.schemas.errors import ANY_CODE
from longvlm.schemas.tables import LISTING, VIDEOS

T0, T1 = datetime.fromisoformat("2026-01-01"), datetime.fromisoformat("2026-01-02")
KNOWN = ("video_id", "recipe", "status", "etag", "size_bytes", "modified_at", "attempts", "error_code", "error")
HOME = "s3://bucket"


@pytest.fixture
def hold(tmp_path):
    """Holds a listing (video_id, etag, size_bytes, modified_at) against a ledger of KNOWN rows, seq by their order.

    `facts` are further columns of each of these.
    """
    opened = []

    def hold(listed, known, *, recipe="r1", home=HOME, facts=None, sources=None, **settings):
        names = ("video_id", "etag", "size_bytes", "modified_at")
        listing = [dict(zip(names, row, strict=True)) | {"uri": f"{HOME}/{row[0]}", "source": HOME} for row in listed]
        ledger = [
            {"uri": f"{HOME}/{row[0]}", "source": (sources or {}).get(seq, HOME), "write_id": f"w{seq}", "seq": seq}
            | dict(zip(KNOWN, (*row, *[None] * (len(KNOWN) - len(row))), strict=True))
            | (facts[seq - 1] if facts else {})
            for seq, row in enumerate(known, start=1)
        ]
        parquet.write_table(pa.Table.from_pylist(listing, LISTING), tmp_path / "listing.parquet")
        path = tmp_path / f"videos.{len(VIDEOS)}.parquet"
        parquet.write_table(pa.Table.from_pylist(ledger, VIDEOS), path)
        files = (DataFile(str(path), 1, len(ledger)),)
        snapshot = Snapshot({"videos": PinnedTable(1, files if ledger else ())})
        changes = compare(str(tmp_path / "listing.parquet"), snapshot, ChangeCriteria(recipe, home, **settings))
        opened.append(changes)
        return changes

    yield hold
    for changes in opened:
        changes.close()


def work(changes):
    return [row for wave in changes.waves(1000) for row in wave]


def bookkeeping(changes, *, prune=False):
    rows = changes.bookkeeping("run", prune=prune).to_pylist()
    return {(row["video_id"], row["status"], row["recipe"], row["write_id"]) for row in rows}


@pytest.mark.parametrize(
    ("listed", "known", "options", "expected"),
    [
        (("v", "e", 5, T0), [], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", "r1", "indexed", "e", 5, T0, 1)], {}, "unchanged"),
        (("v", "e", 5, T1), [("v", "r1", "indexed", "e", 5, T0, 1)], {}, "unchanged"),
        (("v", "f", 5, T0), [("v", "r1", "indexed", "e", 5, T0, 1)], {}, ("work", 0)),
        (("v", "e", 6, T0), [("v", "r1", "indexed", "e", 5, T0, 1)], {}, ("work", 0)),
        (("v", None, 5, T0), [("v", "r1", "indexed", None, 5, T0, 1)], {}, "unchanged"),
        (("v", None, 5, T1), [("v", "r1", "indexed", None, 5, T0, 1)], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", "r1", "failed", "e", 5, T0, 2, "lost")], {}, "known_failed"),
        (("v", "e", 5, T0), [("v", "r1", "failed", "e", 5, T0, 2, "lost")], {"retry_failed": (ANY_CODE,)}, ("work", 2)),
        (("v", "e", 5, T0), [("v", "r1", "failed", "e", 5, T0, 2, "lost")], {"retry_failed": ("lost",)}, ("work", 2)),
        (("v", "e", 5, T0), [("v", "r1", "failed", "e", 5, T0, 2, "lost")], {"retry_failed": ("x",)}, "known_failed"),
        (("v", "f", 5, T0), [("v", "r1", "failed", "e", 5, T0, 2)], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", "r1", "indexed", "e", 5, T0), ("v", None, "deleted")], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", None, "deleted"), ("v", "r1", "indexed", "e", 5, T0)], {}, "unchanged"),
        (("v", "e", 5, T0), [("v", "r2", "indexed", "e", 5, T0, 1)], {}, "stale"),
        (("v", "e", 5, T0), [("v", "r2", "indexed", "e", 5, T0, 1)], {"restale": True}, ("work", 0)),
        (("v", "f", 5, T0), [("v", "r2", "indexed", "e", 5, T0, 1)], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", "r2", "failed", "e", 5, T0, 1)], {}, ("work", 0)),
        (("v", "e", 5, T0), [("v", "r2", "indexed", "e", 5, T0), ("v", None, "deleted")], {}, ("work", 0)),
        (("v", None, None, None), [("v", "r1", "failed", None, None, None, 1)], {}, "known_failed"),
    ],
)
def test_what_has_to_be_done(hold, listed, known, options, expected):
    changes = hold([listed], known, **options)
    if expected in ("unchanged", "known_failed", "stale"):
        assert (changes.num_work, changes.others) == (0, {expected: 1})
    else:
        (row,) = work(changes)
        assert ("work", row["attempts"]) == expected
        assert changes.others == {}


def test_every_listed_video_is_counted_once_and_work_comes_in_waves(hold):
    num = 5_000
    known = [(f"v{i:06}", "r1", "failed" if i % 7 == 0 else "indexed", None, i, T0, 1) for i in range(0, num, 2)]
    changes = hold([(f"v{i:06}", None, i, T0) for i in range(num)], known)
    assert changes.num_work + sum(changes.others.values()) == num
    assert changes.num_work == num // 2
    assert [len(wave) for wave in changes.waves(2_000)] == [2_000, 500]
    (wave,) = changes.waves(1000, limit=3)
    assert [row["video_id"] for row in wave] == ["v000001", "v000003", "v000005"]
    assert set(wave[0]) == {*LISTING.names, "attempts"}


def test_what_is_gone_is_counted_and_deleted_when_asked(hold):
    known = [
        ("here", "r1", "indexed", "e1", 5, T0, 1),
        ("gone", "r1", "indexed", "e2", 5, T0, 1),
        ("gone", "r2", "indexed", "e2", 5, T0, 1),
        ("broken", "r1", "failed", "e3", 5, T0, 1, "truncated"),
        ("before", "r1", "indexed", "e4", 5, T0, 1),
        ("before", None, "deleted"),
    ]
    changes = hold([("here", "e1", 5, T0)], known)
    assert (changes.num_gone, changes.num_known, changes.num_moves) == (2, 3, 0)
    assert bookkeeping(changes) == set()
    assert bookkeeping(changes, prune=True) == {("gone", "deleted", None, None), ("broken", "deleted", None, None)}


def test_other_sources_and_what_the_patterns_hide_are_not_gone(hold):
    known = [("a.mp4", "r1", "indexed", "e1", 5, T0, 1), ("b.mkv", "r1", "indexed", "e2", 5, T0, 1)]
    hidden = hold([], known, covers=lambda uri: uri.endswith(".mkv"))
    assert bookkeeping(hidden, prune=True) == {("b.mkv", "deleted", None, None)}
    assert (hidden.num_gone, hidden.num_known) == (1, 1)
    other = hold([], known, home="s3://another")
    assert bookkeeping(other, prune=True) == set()
    assert (other.num_gone, other.num_known) == (0, 0)


@pytest.mark.parametrize("recipe", ["r1", "r2"])
@pytest.mark.parametrize(("home", "num_gone"), [(HOME, 1), ("list.csv", 0)])
def test_a_source_that_lists_a_video_too_and_failed_to_read_it_does_not_take_it_over(hold, recipe, home, num_gone):
    """Else nobody deletes what is live: the bucket takes it for the list's, and the list is never given again."""
    known = [("v", "r1", "indexed", "e", 5), ("v", recipe, "failed", "e", 5)]
    changes = hold([("other", "o", 5, T0)], known, home=home, sources={2: "list.csv"})
    assert changes.num_gone == num_gone
    assert ("v", "deleted", None, None) in bookkeeping(changes, prune=True) or not num_gone


def test_a_moved_video_takes_its_writes_along_under_every_recipe(hold):
    known = [
        ("old", "r1", "indexed", "e1", 5, T0, 1),
        ("old", "r2", "indexed", "e1", 5, T0, 1),
        ("old", "r3", "indexed", "e0", 5, T0, 1),  # of another content
        ("stays", "r1", "indexed", "e2", 7, T0, 1),
    ]
    changes = hold([("new", "e1", 5, T1), ("stays", "e2", 7, T0), ("copy", "e2", 7, T1)], known)
    assert changes.others == {"moved": 1, "unchanged": 1}
    assert [row["video_id"] for row in work(changes)] == ["copy"]  # what it is a copy of is still there
    assert (changes.num_moves, changes.num_gone) == (1, 0)
    rows = {row["video_id"]: row for row in changes.bookkeeping("run", prune=False).to_pylist()}
    assert bookkeeping(changes) == {
        ("new", "indexed", "r1", "w1"),
        ("new", "indexed", "r2", "w2"),
        ("old", "deleted", None, None),
    }
    assert (rows["new"]["uri"], rows["new"]["modified_at"], rows["new"]["run_id"]) == (f"{HOME}/new", T1, "run")


def test_equal_files_that_move_find_one_another_and_nothing_twice(hold):
    known = [(f"old{i}", "r1", "indexed", "same", 5, T0, 1) for i in range(3)]
    changes = hold([("new0", "same", 5, T0), ("new1", "same", 5, T0)], known)
    assert changes.others == {"moved": 2}
    assert (changes.num_moves, changes.num_gone) == (2, 1)
    taken = [write_id for _, status, _, write_id in bookkeeping(changes) if status == "indexed"]
    assert len(set(taken)) == 2


def test_a_file_without_an_etag_is_known_by_size_and_time_of_change(hold):
    """A folder has no etags; `mv` keeps the time, to the microsecond."""
    known = [("old", "r1", "indexed", None, 5, T0, 1), ("other", "r1", "indexed", "", 6, T0, 1)]
    changes = hold([("new", None, 5, T0), ("other too", None, 6, T0)], known)
    assert changes.others == {"moved": 2}
    assert ("new", "indexed", "r1", "w1") in bookkeeping(changes)
    for another in ((None, 5, T0.replace(microsecond=1)), (None, 6, T0), (None, 5, None), ("e", 5, T0)):
        assert hold([("new", *another)], known[:1]).num_moves == 0


def test_of_files_that_share_size_and_time_none_is_taken_for_another(hold):
    alike = [(name, "r1", "indexed", None, 5, T0, 1) for name in ("old0", "old1")]
    changes = hold([("new0", None, 5, T0), ("new1", None, 5, T0)], alike)
    assert (changes.num_work, changes.num_moves, changes.num_gone) == (2, 0, 2)
    assert hold([("new", None, 5, T0)], alike).num_moves == 0
    assert hold([("new0", None, 5, T0), ("new1", None, 5, T0)], alike[:1]).num_moves == 0


def test_a_file_without_a_byte_is_never_taken_for_a_moved_one(hold):
    known = [("empty", "r1", "indexed", "e", 0, T0, 1), ("void", "r1", "indexed", None, 0, T1, 1)]
    changes = hold([("hollow", "e", 0, T0), ("hollow too", None, 0, T1)], known)
    assert (changes.num_work, changes.num_moves) == (2, 0)


def test_a_moved_video_under_another_recipe_only_is_stale(hold):
    changes = hold([("new", "e1", 5, T1)], [("old", "r2", "indexed", "e1", 5, T0, 1)])
    assert changes.others == {"stale": 1}
    assert bookkeeping(changes) == {("new", "indexed", "r2", "w1"), ("old", "deleted", None, None)}


TOMBSTONE = ("v", None, "deleted", "e", 5, T0, None, "forgotten", PROVED)


@pytest.mark.parametrize(
    ("listed", "way"),
    [
        ([("new", "e", 5, T1)], "forgotten"),
        ([("new", "e", 6, T1)], "work"),
        ([("new", "f", 5, T0)], "work"),
        ([("new", None, 5, T0)], "work"),
    ],
)
def test_a_forgotten_file_under_a_new_name_stays_forgotten(hold, listed, way):
    changes = hold(listed, [TOMBSTONE])
    assert (changes.num_work, changes.others) == ((1, {}) if way == "work" else (0, {way: 1}))
    assert bool(bookkeeping(changes, prune=True)) is (way == "work")  # its file is there, so it stays forgotten


def test_without_etags_a_forgotten_file_is_known_by_size_and_time_if_it_has_these_alone(hold):
    tombstone = [("v", None, "deleted", None, 5, T0, None, "forgotten")]
    assert hold([("new", None, 5, T0), ("other", None, 5, T1)], tombstone).others == {"forgotten": 1}
    assert hold([("new", None, 5, T0), ("other", None, 5, T0)], tombstone).num_work == 2


def test_a_copy_that_was_indexed_before_stays(hold):
    copy = ("copy", "r1", "indexed", "e", 5, T0, 1)
    assert hold([("copy", "e", 5, T0)], [copy, TOMBSTONE]).others == {"unchanged": 1}


def test_a_forgotten_file_under_the_name_of_another_video_stays_forgotten(hold):
    known = ("other", "r1", "indexed", "f", 6, T0, 1)
    assert hold([("other", "e", 5, T0)], [known, TOMBSTONE]).others == {"forgotten": 1}


def test_a_manifest_proves_of_nothing_that_it_is_gone(hold):
    assert bookkeeping(hold([("a", "x", 9, T0)], [TOMBSTONE]), prune=True) == {("v", "deleted", None, None)}
    assert bookkeeping(hold([("a", "x", 9, T0)], [TOMBSTONE], is_manifest=True), prune=True) == set()


def test_a_forgotten_video_stays_out_until_its_file_is_gone(hold):
    forgotten = [
        ("v", "r1", "indexed", "e", 5, T0, 1),
        ("v", None, "deleted", None, None, None, None, "forgotten", PROVED),
    ]
    changes = hold([("v", "e", 5, T0)], forgotten)
    assert (changes.num_work, changes.others) == (0, {"forgotten": 1})
    late = [*forgotten, ("v", "r1", "indexed", "f", 6, T0, 1)]  # committed by a run that was under way
    assert hold([("v", "f", 6, T0)], late).others == {"forgotten": 1}
    gone = hold([], late)
    assert bookkeeping(gone) == set()
    assert bookkeeping(gone, prune=True) == {("v", "deleted", None, None)}
    assert bookkeeping(hold([], late, covers=lambda _: True), prune=True) == set()  # nobody knows its name any more
    back = hold([("v", "e", 5, T0)], [*late, ("v", None, "deleted")])
    assert (back.num_work, back.others) == (1, {})


CONSTANT = [
    (250, 10.0),
    (1, 0.04),
    (289, 289 * 1001 / 30_000),  # 29.97
    (310, 10.333),  # 30, as Matroska's milliseconds have it
    (120, 9.6),  # 12.5
    (8, 40.0),  # a frame every five seconds
    (None, None),  # failed before it was opened, once
]
UNEVEN = [(261, 65.0), (4, 1801.0), (576, 34.44), (63, 502_589 / 57_600), (58, 2.5)]


def test_what_even_spread_took_at_wrong_times_is_stale(hold):
    names = [f"{num_frames} in {duration_s} s" for num_frames, duration_s in CONSTANT + UNEVEN]
    facts = [
        {"num_frames": num_frames, "duration_s": duration_s, "fps": num_frames and num_frames / duration_s}
        for num_frames, duration_s in CONSTANT + UNEVEN
    ]
    listed = [(name, "e", 5, T0) for name in names]
    known = [(name, "r1", "indexed", "e", 5, T0, 1) for name in names]
    changes = hold(listed, known, facts=facts)
    assert (changes.num_work, changes.num_mistimed) == (0, len(UNEVEN))
    assert changes.others == {"unchanged": len(CONSTANT), "stale": len(UNEVEN)}
    told = {row["video_id"] for row in work(hold(listed, known, facts=facts, restale=True))}
    assert told == {*names[len(CONSTANT) :]}


@pytest.mark.parametrize(
    ("rule", "settings", "num_work"),
    [(None, {"restale": True}, 1), (2, {"restale": True}, 0), (2, {}, 0), (None, {"by_time": False}, 0)],
)
def test_what_is_mistimed_is_watched_when_asked_for(hold, rule, settings, num_work):
    facts = [{"num_frames": 261, "duration_s": 65.0, "fps": 261 / 65, "time_rule": rule}]
    changes = hold([("v", "e", 5, T0)], [("v", "r1", "indexed", "e", 5, T0, 1)], facts=facts, **settings)
    assert (changes.num_work, changes.others) == (num_work, {} if num_work else {"unchanged": 1})


def test_what_came_into_the_ledger_since_the_listing_began_is_not_gone(hold):
    known = [("old", "r1", "indexed", "e", 5, T0), ("new", "r1", "indexed", "f", 6, T0)]
    assert bookkeeping(hold([], known, listed_seq=1), prune=True) == {("old", "deleted", None, None)}
    moved = hold([("name", "f", 6, T0)], known, listed_seq=1)
    assert (moved.others, bookkeeping(moved)) == ({}, set())


def test_a_video_that_was_forgotten_since_the_listing_began_stays_so(hold):
    known = [("v", "r1", "indexed", "e", 5, T0), TOMBSTONE]
    assert bookkeeping(hold([], known, listed_seq=1), prune=True) == set()
    assert bookkeeping(hold([], known, listed_seq=2), prune=True) == {("v", "deleted", None, None)}


def test_what_is_being_erased_is_not_lifted_before_that_is_proved(hold):
    assert bookkeeping(hold([], [TOMBSTONE[:-1]]), prune=True) == set()  # it would go on with what is indexed next
    assert bookkeeping(hold([], [TOMBSTONE[:-1], TOMBSTONE]), prune=True) == {("v", "deleted", None, None)}
    assert bookkeeping(hold([], [TOMBSTONE, TOMBSTONE[:-1]]), prune=True) == set()  # it is erased once more
