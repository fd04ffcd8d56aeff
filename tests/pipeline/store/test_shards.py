from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
from stores import segment, unit

from benchmarks import read as benchmark
from longvlm.pipeline.store.shards import SEARCHED, by_video, read_segments, read_tokens, write_shards
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.identity import new_write_id


def commit(store, *made: pa.Table) -> list[pa.Table]:
    outcomes = [write_shards(store.uri, units, "recipe") for units in made]
    for outcome in outcomes:
        store.commit(outcome, tables.VIDEOS.empty_table())
    return outcomes


def as_tokens(*made: pa.Table) -> list[dict]:
    """The rows of `tokens` that encoded units should give, in reading order."""
    rows = [
        {**{name: part.get(name) for name in tables.TOKENS.names}, "recipe": "recipe"}
        | {name: encoded[name] for name in ("video_id", "write_id")}
        for table in made
        for encoded in table.to_pylist()
        for part in encoded["segments"]
    ]
    return sorted(rows, key=lambda row: (row["write_id"], row["segment"]))


def test_what_is_written_is_read_again(store):
    made = stores.encoded(["a", "b", "c"])
    commit(store, made)
    read = read_tokens(store.pin(), made["write_id"].to_pylist())
    assert read.schema == tables.TOKENS
    assert read.to_pylist() == as_tokens(made)


def test_one_outcome_a_unit_in_order_and_all_name_the_same_closed_files(store, tmp_path):
    made = stores.encoded(["a", "b", "c"])
    failed = pa.Table.from_pylist([unit("broken", new_write_id())], tables.ENCODED)
    mixed = pa.concat_tables([made.slice(2), failed, made.slice(0, 2)])
    outcomes = write_shards(store.uri, mixed, "recipe")
    assert outcomes.schema == tables.OUTCOMES
    assert outcomes["write_id"].to_pylist() == mixed["write_id"].to_pylist()
    rows = outcomes.to_pylist()
    assert (rows[1]["error_code"], rows[1]["tokens_shard"], rows[1]["segments_shard"]) == ("truncated", None, None)
    for table in ("tokens", "segments"):
        files = [path.name for path in (tmp_path / "store" / table).glob("*.parquet")]
        assert [row[f"{table}_shard"]["path"] for row in rows if row["error_code"] is None] == files * 3


def test_where_no_unit_is_good_no_file_is_written(store, tmp_path):
    failed = pa.Table.from_pylist([unit("broken", new_write_id())], tables.ENCODED)
    for units in (failed, failed.slice(1)):
        outcomes = write_shards(store.uri, units, "recipe")
        assert outcomes.num_rows == units.num_rows
    assert not [path for table in ("tokens", "segments") for path in (tmp_path / "store" / table).glob("*.parquet")]


def test_a_video_of_several_units_in_several_shards_comes_back_in_time_order(store):
    random = np.random.default_rng(1)
    write_id = new_write_id()
    units = [
        unit("long", write_id, index, 3, [segment(index * 2 + i, random) for i in range(2)]) for index in (2, 0, 1)
    ]
    made = [pa.Table.from_pylist(part, tables.ENCODED) for part in (units[:2], units[2:])]
    commit(store, *made, stores.encoded(["other"]))
    read = read_tokens(store.pin(), [write_id])
    assert read["segment"].to_pylist() == [0, 1, 2, 3, 4, 5]
    assert read.to_pylist() == as_tokens(*made)


def test_a_unit_written_twice_is_read_once(store):
    made = stores.encoded(["a", "b"])
    commit(store, made, made.slice(1))
    read = read_tokens(store.pin(), made["write_id"].to_pylist())
    assert read.to_pylist() == as_tokens(made)


def test_only_files_that_may_hold_a_video_are_opened(store):
    made = stores.encoded(["a", "b"])
    commit(store, made)
    tokens = store.pin().table("tokens")
    gone = DataFile("/nowhere.parquet", 1, 1, "ffff", "ffff")  # reading it would raise
    snapshot = Snapshot({"tokens": PinnedTable(tokens.version, (*tokens.files, gone))})
    wanted = [made["write_id"][1].as_py(), new_write_id()]
    assert set(read_tokens(snapshot, wanted)["write_id"].to_pylist()) == {wanted[0]}
    assert read_tokens(snapshot, ["unknown"]).num_rows == 0
    assert read_tokens(snapshot, []).num_rows == 0


def test_of_a_row_group_that_videos_share_only_the_wanted_rows_come(store):
    made = stores.encoded(["a", "b", "c"])
    commit(store, made)
    (file,) = store.pin().table("tokens").files
    assert pq.ParquetFile(file.uri).num_row_groups == 1
    read = read_tokens(store.pin(), [made["write_id"][1].as_py()])
    assert read.to_pylist() == as_tokens(made.slice(1, 1))


@pytest.mark.parametrize("num_wanted", [1, 8])
def test_a_few_videos_of_a_hundred_cost_less_than_three_times_their_bytes(store, num_wanted):
    shortest = benchmark.make_rows(100, 1, 80)  # ten seconds of `long`: the least that one video has
    assert 1 < benchmark.bytes_ratio(store.uri, shortest, num_wanted) < 2.5


def test_rows_are_told_apart_by_video_without_copying(store):
    made = stores.encoded(["a", "b", "c"])
    commit(store, made)
    read = read_tokens(store.pin(), made["write_id"].to_pylist())
    parts = by_video(read)
    assert list(parts) == made["write_id"].to_pylist()
    for number, part in enumerate(parts.values()):
        assert part.to_pylist() == as_tokens(made.slice(number, 1))
    addresses = {chunk.buffers()[2].address for chunk in read["local"].chunks}
    assert {chunk.buffers()[2].address for part in parts.values() for chunk in part["local"].chunks} == addresses
    assert by_video(read.slice(0, 0)) == {}


@pytest.mark.parametrize("also", [(), SEARCHED, ("thumbnail",)])
def test_segments_are_read_by_video_too(store, also):
    made = stores.encoded(["a", "b"])
    commit(store, made)
    wanted = made["write_id"][0].as_py()
    rows = read_segments(store.pin(), [wanted], also)
    names = ["write_id", "segment", "start_s", "end_s", "first_frame", "last_frame", "frames", "times_s"]
    names += also
    assert rows.schema == pa.schema([tables.SEGMENTS.field(name) for name in names])
    segments = made["segments"][0].as_py()
    want = [{"write_id": wanted} | {name: part[name] for name in names[1:]} for part in segments]
    assert rows.to_pylist() == want


@pytest.mark.parametrize("was_read_before", [False, True])
def test_a_shard_that_vanished_is_told_and_the_other_shards_are_read(store, was_read_before):
    kept, lost = stores.encoded(["a"]), stores.encoded(["b"])
    commit(store, kept, lost)
    snapshot = store.pin()
    gone = snapshot.files_for("tokens", lost["write_id"].to_pylist())[0]
    if was_read_before:
        assert read_tokens(snapshot, lost["write_id"].to_pylist()).num_rows == 4
    Path(gone.uri).unlink()
    with pytest.raises(TerminalError, match="is gone since the run began") as caught:
        read_tokens(snapshot, lost["write_id"].to_pylist())
    assert caught.value.code == ErrorCode.NOT_FOUND
    assert read_tokens(snapshot, kept["write_id"].to_pylist()).num_rows == 4


def test_a_damaged_shard_is_told(store):
    made = stores.encoded(["a"])
    commit(store, made)
    (file,) = store.pin().table("tokens").files
    Path(file.uri).write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(TerminalError, match="is damaged") as caught:
        read_tokens(store.pin(), made["write_id"].to_pylist())
    assert caught.value.code == ErrorCode.BAD_TOKENS


def test_segments_without_cls_and_embedding_keep_their_nulls(store):
    random = np.random.default_rng(2)
    bare = {**segment(0, random, embedded=False), "cls": None}
    made = pa.Table.from_pylist([unit("a", new_write_id(), segments=[bare])], tables.ENCODED)
    commit(store, made)
    assert read_tokens(store.pin(), made["write_id"].to_pylist())["cls"].to_pylist() == [None]
