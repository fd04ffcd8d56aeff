"""Drivers that slept between a look and their commit: what they held on to is taken away meanwhile."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import stores
from stores import rows

from longvlm.pipeline.store import delta, look, taken
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep.compact import compact
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.erase import erase
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import clock, tables
from longvlm.schemas.identity import new_write_id, video_id

LONG = stores.LONG.fingerprint
NOTHING = tables.VIDEOS.empty_table()


def live(store):
    return {Path(row["uri"]).stem for row in rows(store, "SELECT uri FROM live_videos")}


def is_well(store):
    """Whether every file can be read, and every live video has its tokens."""
    verified = verify(store.pin())
    return not verified.damaged_files and not verified.problems


def two_units(name, random_seed=0):
    """The outcomes of the two units of a video, which are written apart, and its row."""
    write_id = new_write_id()
    random = np.random.default_rng(random_seed)
    units = []
    for index in range(2):
        segments = [stores.segment(2 * index + i, random) for i in range(2)]
        made = stores.unit(name, write_id, index, 2, segments) | {"num_segments": 4}
        units.append(pa.Table.from_pylist([made], tables.ENCODED))
    return units, lambda outcomes: stores.videos(outcomes, [name], LONG)


def test_shards_that_were_vacuumed_meanwhile_are_not_named_and_no_reader_fails(store):
    stores.index(store, ["a"])
    outcomes = write_shards(store.uri, stores.encoded(["b"], seed=1), LONG)
    assert vacuum(Store.open(store.uri), 0)["files"] == 2
    left_out = store.commit(outcomes, stores.videos(outcomes, ["b"], LONG))
    assert left_out == {*outcomes["write_id"].to_pylist()}
    assert (live(store), is_well(store)) == ({"a"}, True)
    stores.index(store, ["b"], seed=2)
    assert (live(store), is_well(store)) == ({"a", "b"}, True)


def test_a_shard_that_is_about_to_go_is_not_named_though_it_is_there_still(store):
    outcomes = write_shards(store.uri, stores.encoded(["a"]), LONG)
    path = outcomes["tokens_shard"][0].as_py()["path"]
    with Store.open(store.uri).taking("tokens", lambda _: [path]):
        assert store.commit(outcomes, stores.videos(outcomes, ["a"], LONG))
    assert not live(store)
    assert not store.pin().table("tokens").files


def test_what_is_taken_between_the_look_and_the_commit_makes_the_commit_look_again(store, monkeypatch):
    other = Store.open(store.uri)
    outcomes = write_shards(store.uri, stores.encoded(["a"]), LONG)
    plain, swept = delta.commit, []

    def sleep_first(handle, actions):
        if not swept:
            swept.append(0)
            swept[0] = vacuum(other, 0)["files"]
        plain(handle, actions)

    monkeypatch.setattr(delta, "commit", sleep_first)
    assert store.commit(outcomes, stores.videos(outcomes, ["a"], LONG))
    assert (swept, live(store), is_well(store)) == ([2], set(), True)


def test_a_commit_beside_an_erasure_looks_again_where_a_file_of_the_ledger_is_gone(store, monkeypatch):
    stores.index(store, ["a", "b"])
    driver, plain, asked = Store.open(store.uri), look._deletions, []

    def read_late(uri):
        if not asked:
            asked.append(uri)
            erase(store, [video_id(stores.uri_of("b"))], "run")
        return plain(uri)

    monkeypatch.setattr(look, "_deletions", read_late)
    stores.index(driver, ["c"])
    assert not Path(asked[0]).exists()
    assert live(store) == {"a", "c"}


def test_a_video_becomes_live_with_all_its_units_or_not_at_all(store):
    (first, second), row = two_units("a")
    store.commit(write_shards(store.uri, first, LONG), NOTHING)
    other = Store.open(store.uri)
    compact(other, dead_writes(other, -1))  # an hour ahead: all that never was live is older than the retention
    assert not store.pin().table("tokens").files
    outcomes = write_shards(store.uri, second, LONG)
    assert store.commit(outcomes, row(outcomes)) == {*outcomes["write_id"].to_pylist()}
    assert not live(store)


@pytest.mark.usefixtures("few_are_merged")
def test_units_whose_shards_were_merged_meanwhile_are_there(store):
    (first, second), row = two_units("a")
    store.commit(write_shards(store.uri, first, LONG), NOTHING)
    other = Store.open(store.uri)
    for number in range(2):
        stores.index(other, [f"v{number}"], seed=number + 1)
    assert compact(other, dead_writes(other, 48))["tokens"] == 2
    outcomes = write_shards(store.uri, second, LONG)
    assert not store.commit(outcomes, row(outcomes))
    assert ("a" in live(store), is_well(store)) == (True, True)
    assert read_tokens(store.pin(), outcomes["write_id"].to_pylist()).num_rows == 4


def test_a_write_whose_rows_are_being_dropped_does_not_become_live(store):
    outcomes = write_shards(store.uri, stores.encoded(["a"]), LONG)
    store.commit(outcomes, NOTHING)
    with Store.open(store.uri).taking("videos", lambda _: outcomes["write_id"].to_pylist()):
        assert store.commit(outcomes, stores.videos(outcomes, ["a"], LONG))
    assert not live(store)


def test_rows_come_in_the_order_of_their_commits_whatever_the_clocks_say(store, monkeypatch):
    other = Store.open(store.uri)
    plain = delta.commit

    def overtaken(handle, actions):
        monkeypatch.setattr(delta, "commit", plain)
        stores.index(other, ["a"], seed=1)
        plain(handle, actions)

    outcomes = write_shards(store.uri, stores.encoded(["a"]), LONG)
    store.commit(outcomes, NOTHING)
    monkeypatch.setattr(delta, "commit", overtaken)
    store.commit(outcomes, stores.videos(outcomes, ["a"], LONG))
    (row,) = rows(store, "SELECT write_id FROM live_videos")
    assert row["write_id"] == outcomes["write_id"][0].as_py()


def test_the_note_of_who_was_killed_does_no_harm_and_goes(store, monkeypatch):
    taken.note(store.uri, "tokens", ["never-there"])
    Path(store.uri, "taken", "tokens", "cut.json").write_text('["half')
    stores.index(store, ["a"])
    assert live(store) == {"a"}
    vacuum(store, 48)
    assert taken.taken(store.uri, "tokens") == {"never-there"}
    monkeypatch.setattr(clock, "time_ns", lambda: 4 * 10**18)
    taken.strike_old(store.uri, "tokens", 48)
    assert not list(Path(store.uri, "taken", "tokens").iterdir())


def test_in_a_bucket_too(s3):
    store = Store.create("s3://bucket/index")
    outcomes = write_shards(store.uri, stores.encoded(["a", "b"]), LONG)
    path = outcomes["tokens_shard"][0].as_py()["path"]
    s3.delete_object(Bucket="bucket", Key=f"index/tokens/{path}")
    assert len(store.commit(outcomes, stores.videos(outcomes, ["a", "b"], LONG))) == 2
    stores.index(store, ["a", "b"], seed=1)
    assert (live(store), is_well(store)) == ({"a", "b"}, True)


@pytest.mark.parametrize("status", ["indexed", "failed"])
def test_nothing_of_a_forgotten_video_is_noted(store, status):
    stores.index(store, ["a", "b"])
    tombstone = stores.deleted(["a"]).to_pylist()[0] | {"error_code": "forgotten", "uri": None}
    store.append("videos", pa.Table.from_pylist([tombstone], tables.VIDEOS))
    late = stores.videos(write_shards(store.uri, stores.encoded(["a"]), LONG), ["a"], LONG, status=status)
    assert store.append("videos", late)["video_id"].to_pylist() == late["video_id"].to_pylist()
