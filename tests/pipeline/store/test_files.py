import json
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores

from longvlm.pipeline.store.files import canonical, conformed, filesystem, num_columns, write_parquet
from longvlm.pipeline.store.shards import write_shards
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


def test_addresses_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert canonical("store/") == str(tmp_path / "store")
    assert canonical(f"file://{tmp_path}/store") == str(tmp_path / "store")
    assert canonical("s3://bucket/store/") == "s3://bucket/store"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert canonical("~/store") == str(tmp_path / "store")
    for name in ("a:b", "zip::store", "C:\\store", "file:store"):
        assert canonical(name) == str(tmp_path / name)
        assert filesystem(canonical(name))[1] == str(tmp_path / name)


@pytest.mark.parametrize(
    ("uri", "word"),
    [("memory://x", "folder"), ("/data/*", "pattern"), ("ftp://x/y", "folder"), ("local:///data", "folder")],
)
def test_an_address_where_no_store_can_be_is_refused(uri, word):
    with pytest.raises(InputError, match=word):
        canonical(uri)


def token_rows(num_videos: int, segments_per_video: int, blob_bytes: int) -> pa.Table:
    rows = num_videos * segments_per_video
    columns = {field.name: pa.nulls(rows, field.type) for field in tables.TOKENS}
    columns["local"] = pa.array([bytes(blob_bytes)] * rows)
    columns["write_id"] = pa.array([f"{i // segments_per_video:04d}" for i in range(rows)])
    columns["segment"] = pa.array([i % segments_per_video for i in range(rows)], pa.int32())
    return pa.table(columns, schema=tables.TOKENS)


def segment_rows(num_videos: int) -> pa.Table:
    columns = {field.name: pa.nulls(num_videos, field.type) for field in tables.SEGMENTS}
    columns["embedding"] = pa.array([[0.0] * 100] * num_videos, pa.list_(pa.float32()))
    columns["write_id"] = pa.array([f"{i:04d}" for i in range(num_videos)])
    return pa.table(columns, schema=tables.SEGMENTS)


def groups_of(store, table: str, shard: dict) -> list[pa.Table]:
    parquet = pq.ParquetFile(f"{store.uri}/{table}/{shard['path']}")
    return [parquet.read_row_group(i, columns=["write_id", "segment"]) for i in range(parquet.num_row_groups)]


@pytest.mark.parametrize(("blob_bytes", "videos_per_group"), [(50_000, 1), (45_000, 2), (10_000, 9)])
def test_a_video_has_its_own_row_group_unless_it_is_very_small(store, blob_bytes, videos_per_group):
    shard = write_parquet(store.uri, "tokens", token_rows(20, 2, blob_bytes))
    groups = groups_of(store, "tokens", shard)
    whole, rest = divmod(20, videos_per_group)
    assert [group.num_rows for group in groups] == [2 * videos_per_group] * whole + [2 * rest] * bool(rest)
    assert all(group["segment"].to_pylist() == [0, 1] * (len(group) // 2) for group in groups)


def test_a_long_video_spans_row_groups_of_8_mb_and_shares_none(store):
    rows = pa.concat_tables([token_rows(1, 1, 1000), token_rows(1, 300, 100_000), token_rows(1, 1, 1000)])
    rows = rows.set_column(2, "write_id", pa.array(["a", *["b"] * 300, "c"]))
    groups = groups_of(store, "tokens", write_parquet(store.uri, "tokens", rows))
    assert [set(group["write_id"].to_pylist()) for group in groups] == [{"a"}, *[{"b"}] * 4, {"c"}]
    for group in groups[1:-2]:
        assert 7 << 20 <= group.num_rows * 100_000 <= 8 << 20


def test_row_groups_of_other_tables_hold_many_videos(store):
    shard = write_parquet(store.uri, "segments", rows := segment_rows(3000))
    groups = groups_of(store, "segments", shard)
    assert sum(group.num_rows for group in groups) == rows.num_rows
    assert all(group.num_rows > 500 for group in groups[:-1])


def test_a_segment_larger_than_a_row_group_stays_whole(store):
    shard = write_parquet(store.uri, "tokens", token_rows(1, 3, 9 << 20))
    metadata = pq.ParquetFile(f"{store.uri}/tokens/{shard['path']}").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1, 1, 1]


def test_ids_are_dictionary_encoded_and_blobs_plain(store):
    outcomes = write_shards(store.uri, stores.encoded(["a", "b"]), "recipe")
    for table, blobs in {
        "tokens": {"local", "sizes", "spans", "cls", "positions", "scales"},
        "segments": {"embedding", "thumbnail", "frames", "times_s", "frame_embeddings"},
    }.items():
        shard = outcomes[f"{table}_shard"][0].as_py()
        group = pq.ParquetFile(f"{store.uri}/{table}/{shard['path']}").metadata.row_group(0)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.partition(".")[0]
            assert ("RLE_DICTIONARY" in column.encodings) == (name not in blobs)
            assert column.is_stats_set == (name not in blobs)
            assert (column.compression == "UNCOMPRESSED") == (name in blobs or table == "tokens")


def test_the_log_is_told_what_a_planner_prunes_by(store):
    made = stores.encoded(["a", "b"], num_segments=3)
    shard = write_shards(store.uri, made, "recipe")["tokens_shard"][0].as_py()
    stats = json.loads(shard["stats"])
    write_ids = made["write_id"].to_pylist()
    assert stats["numRecords"] == 6
    assert (stats["minValues"]["write_id"], stats["maxValues"]["write_id"]) == (min(write_ids), max(write_ids))
    assert (stats["minValues"]["segment"], stats["maxValues"]["segment"]) == (0, 2)
    assert stats["nullCount"] == {"video_id": 0, "recipe": 0, "write_id": 0, "segment": 0}
    assert shard["size_bytes"] == Path(store.uri, "tokens", shard["path"]).stat().st_size


def test_a_full_disk_is_told_and_leaves_no_half_file(store, tmp_path):
    random = np.random.default_rng(0)
    unit = stores.unit("a", stores.new_write_id(), segments=[stores.segment(0, random, num_tokens=5000)])
    made = pa.Table.from_pylist([unit], tables.ENCODED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond this
    try:
        with pytest.raises(OSError, match="too large"):
            write_shards(store.uri, made, "recipe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "store" / "tokens").glob("*.parquet"))


def test_a_files_name_says_how_many_columns_it_has(store):
    shard = write_parquet(store.uri, "runs", pa.Table.from_pylist([{"run_id": "r"}], tables.RUNS))
    assert num_columns("runs", f"{store.uri}/runs/{shard['path']}") == len(tables.RUNS)
    assert num_columns("runs", "s3://b.12.parquet/runs/5c1c737b-fb28-4e89-bae3-405f7ba20580.31.parquet") == 31
    assert num_columns("runs", "/s/runs/5c1c737b-fb28-4e89-bae3-123456789012.parquet") == 7  # of 0.1.0
    assert num_columns("videos", "/s/videos/5c1c737b-fb28-4e89-bae3-123456789012.parquet") == 26


def test_columns_that_a_file_lacks_are_null():
    rows = pa.table({"b": [1, 2], "a": ["x", "y"], "unknown": [0, 0]})
    schema = pa.schema([("a", pa.string()), ("b", pa.int32()), ("c", pa.list_(pa.float32()))])
    made = conformed(rows, schema)
    assert made.schema == schema
    assert made.to_pylist() == [{"a": "x", "b": 1, "c": None}, {"a": "y", "b": 2, "c": None}]
    assert conformed(made, schema) is made
