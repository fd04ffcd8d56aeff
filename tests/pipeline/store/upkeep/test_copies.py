from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from stores import rows

from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep import copies
from longvlm.pipeline.store.upkeep.copies import find_left_over, write_copies
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError

OTHER = replace(stores.LONG, name="other", dtype="int8")
_BLOBS = "segment, num_tokens, local, sizes, spans, cls, t.num_frames"


def left_over(store, given_up=(), most=100):
    return find_left_over(store, stores.LONG.fingerprint, OTHER.fingerprint, list(given_up), most)


def copy(store, change=lambda rows: rows, **asked):
    left = left_over(store, **asked)
    copied = write_copies(store, left.snapshot, left.rows, OTHER.fingerprint, "run", change)
    return copied, store.commit(copied.outcomes, copied.videos, left.look)


def blobs(store, under, table="tokens", what=_BLOBS):
    sql = f"SELECT v.uri, {what} FROM ledger_{table} t JOIN live_videos v USING (write_id)"
    return rows(store, f"{sql} WHERE v.recipe = '{under.fingerprint}' ORDER BY uri, segment")


@pytest.mark.parametrize("piece_bytes", [1, 32 << 20])
def test_copies_hold_what_the_originals_hold(store, monkeypatch, piece_bytes):
    monkeypatch.setattr(copies, "_PIECE_BYTES", piece_bytes)
    stores.index(store, ["a", "b", "c"], keyframe_shift_s=0.5, time_rule=2)
    stores.index(store, ["b"], seed=1)
    stores.index(store, ["d"], seed=2)
    copied, left_out = copy(store)
    assert (copied.problems, left_out, len(copied.copied_from)) == ({}, frozenset(), 4)
    assert blobs(store, OTHER) == blobs(store, stores.LONG)
    shown = "segment, start_s, first_frame, embedding"
    assert blobs(store, OTHER, "segments", shown) == blobs(store, stores.LONG, "segments", shown)
    told = "SELECT * EXCLUDE (recipe, write_id, seq, run_id) FROM live_videos WHERE recipe = '{}' ORDER BY uri"
    assert rows(store, told.format(OTHER.fingerprint)) == rows(store, told.format(stores.LONG.fingerprint))
    (file,) = {file.uri for write in copied.copied_from for file in store.pin().files_for("tokens", [write])}
    assert read_tokens(store.pin(), list(copied.copied_from))["recipe"].unique().to_pylist() == [OTHER.fingerprint]
    assert Path(file).exists()
    assert left_over(store).num_videos == 0
    assert (verify(store.pin()).problems, verify(store.pin()).num_videos) == ([], 8)
    stores.index(store, ["a"], seed=3, etag="2")
    assert [row["etag"] for row in left_over(store).rows] == ["2"]


def test_a_video_of_several_shards_some_of_them_written_twice_is_copied_whole(store):
    made = stores.encoded(["a", "b"], num_segments=6).to_pylist()
    halves = [
        [{**one, "unit": unit, "num_units": 2, "segments": one["segments"][3 * unit :][:3]} for one in made]
        for unit in (1, 0, 1)
    ]
    outcomes = pa.concat_tables(
        [
            write_shards(store.uri, pa.Table.from_pylist(half, tables.ENCODED), stores.LONG.fingerprint)
            for half in halves
        ]
    )
    store.commit(outcomes.slice(0, 4), stores.videos(outcomes.slice(2, 2), ["a", "b"], stores.LONG.fingerprint))
    again = outcomes.slice(4)  # what a lost answer leads to: named twice, with equal blobs
    store.commit(again, tables.VIDEOS.empty_table())
    assert len(blobs(store, stores.LONG)) == 18
    copied, _ = copy(store)
    assert copied.problems == {}
    assert blobs(store, OTHER) == [row for i, row in enumerate(blobs(store, stores.LONG)) if i % 9 < 3 or i % 2]


def test_what_cannot_be_changed_or_lacks_a_segment_is_left_as_it_is(store):
    made = stores.encoded(["whole", "torn", "odd"]).to_pylist()
    made[1]["segments"].pop(2)
    outcomes = write_shards(store.uri, pa.Table.from_pylist(made, tables.ENCODED), stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["whole", "torn", "odd"], stores.LONG.fingerprint))
    odd = made[2]["write_id"]

    def change(rows):
        if rows["write_id"][0].as_py() == odd:
            raise TerminalError(ErrorCode.BAD_TOKENS, "it is odd")
        return rows

    copied, _ = copy(store, change)
    assert copied.problems == {made[1]["write_id"]: "tokens has 3 segments of 4", odd: "it is odd"}
    assert {row["uri"] for row in blobs(store, OTHER)} == {stores.uri_of("whole")}
    assert left_over(store, given_up=copied.problems).rows == []


@pytest.mark.parametrize("what", ["deleted", "indexed"])
def test_a_copy_gives_way_to_what_became_of_its_video_since(store, what):
    stores.index(store, ["a", "b"])
    left = left_over(store)
    copied = write_copies(store, left.snapshot, left.rows, OTHER.fingerprint, "run", lambda rows: rows)
    if what == "deleted":
        store.append("videos", stores.deleted(["a"]))
    else:
        stores.index(store, ["a"], seed=1, etag="2")
    left_out = store.commit(copied.outcomes, copied.videos, left.look)
    assert len(left_out) == 1
    assert {row["uri"] for row in blobs(store, OTHER)} == {stores.uri_of("b")}
    copy(store)
    assert len(blobs(store, OTHER)) == (4 if what == "deleted" else 8)


def test_a_file_that_is_gone_costs_only_its_videos(store):
    stores.index(store, ["here"])
    stores.index(store, ["gone"], seed=1)
    (row,) = rows(store, f"SELECT write_id FROM live_videos WHERE uri = '{stores.uri_of('gone')}'")
    (file,) = store.pin().files_for("tokens", [row["write_id"]])
    Path(file.uri).unlink()
    copied, _ = copy(store)
    assert list(copied.problems) == [row["write_id"]]
    assert f"tokens has 0 segments of 4; {file.uri} is damaged: " in copied.problems[row["write_id"]]
    assert copied.videos["uri"].to_pylist() == [stores.uri_of("here")]


def test_so_many_at_a_time_in_the_order_of_their_writes(store):
    stores.index(store, ["a", "b", "c"])
    left = left_over(store, most=2)
    writes = [row["write_id"] for row in left.rows]
    assert (left.num_videos, len(writes), writes) == (3, 2, sorted(writes))
