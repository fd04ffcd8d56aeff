"""Shards: the tokens and segments of many videos in closed parquet files, written by workers, read by write id."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.store.files import filesystem, is_local, write_parquet
from pipeline.store.snapshot import DataFile, Snapshot
from schemas import tables


def write_shards(store_uri: str, encoded: pa.Table, recipe: str) -> pa.Table:
    """Write the good units of one call as one tokens file and one segments file, and say how each unit fared.

    Both files are closed when this returns, and are part of no table before `Store.commit` names them. Nothing is kept
    between calls: a call made again writes files of its own, and those of the first are never named.

    Args:
        store_uri: a store made by `Store.create`.
        encoded: `tables.ENCODED`, a row a unit; a unit with an `error_code` passes through without a shard.
        recipe: fingerprint of the recipe that made them.

    Returns:
        `tables.OUTCOMES`, a row a unit in the same order; all good units name the same two shards.

    Raises:
        OSError: the disk is full, read-only or out of reach. No file of this call will ever be named.
    """
    is_good = pc.is_null(encoded["error_code"]).to_pylist()
    rows = _segment_rows(encoded, is_good, recipe)
    shards: dict[str, dict[str, Any] | None] = {"tokens": None, "segments": None}
    if rows.num_rows:
        shards["tokens"] = write_parquet(store_uri, "tokens", rows.select(tables.TOKENS.names).cast(tables.TOKENS))
        shards["segments"] = write_parquet(
            store_uri, "segments", rows.select(tables.SEGMENTS.names).cast(tables.SEGMENTS)
        )
    outcomes = encoded.drop_columns(["segments"])
    for table, shard in shards.items():
        named = pa.array([shard if good else None for good in is_good], tables.SHARD)
        outcomes = outcomes.append_column(f"{table}_shard", named)
    return outcomes.select(tables.OUTCOMES.names).cast(tables.OUTCOMES)


def _segment_rows(encoded: pa.Table, is_good: list[bool], recipe: str) -> pa.Table:
    """One row a segment of the good units, ordered by write id and segment; blobs are not copied."""
    units = zip(encoded["write_id"].to_pylist(), encoded["unit"].to_pylist(), range(encoded.num_rows), strict=True)
    pieces = []
    for _, _, row in sorted(unit for unit in units if is_good[unit[2]]):
        unit = encoded.slice(row, 1).to_batches()[0]
        segments = unit["segments"].flatten()
        columns = dict(zip([field.name for field in segments.type], segments.flatten(), strict=True))
        for name in ("video_id", "write_id"):
            columns[name] = pa.repeat(unit[name][0], len(segments))
        columns["recipe"] = pa.repeat(recipe, len(segments))
        pieces.append(pa.table(columns))
    return pa.concat_tables(pieces) if pieces else pa.table({})


def read_tokens(snapshot: Snapshot, write_ids: list[str]) -> pa.Table:
    """The stored tokens of some videos, read from the row groups that hold them and no others.

    Files are pruned by the log's statistics, row groups by the file's; local files are memory-mapped.

    Returns:
        `tables.TOKENS`, ordered by write id and segment, each once; a write id without rows is absent.

    Raises:
        OSError: a file is out of reach or was vacuumed after the snapshot was pinned.
    """
    wanted = pa.array(sorted(set(write_ids)), pa.string())
    runs: list[tuple[str, int, pa.Table]] = []
    for file in snapshot.files_for("tokens", wanted.to_pylist()):
        for rows in _wanted_row_groups(file, wanted):
            runs.extend(_runs(rows))
    if not runs:
        return tables.TOKENS.empty_table()
    found = pa.concat_tables([rows for _, _, rows in sorted(runs, key=lambda run: run[:2])])
    return _each_once(found)


def _wanted_row_groups(file: DataFile, wanted: pa.Array) -> list[pa.Table]:
    if is_local(file.uri):
        return _matching(pq.ParquetFile(file.uri, memory_map=True), wanted)
    fs, path = filesystem(file.uri)
    with fs.open(path, "rb", cache_type="none") as remote:  # pre_buffer asks for exactly the ranges it needs
        return _matching(pq.ParquetFile(remote, pre_buffer=True), wanted)


def _matching(parquet: pq.ParquetFile, wanted: pa.Array) -> list[pa.Table]:
    """The wanted rows, a table a row group that has any."""
    column = parquet.schema_arrow.get_field_index("write_id")
    found = []
    for group in range(parquet.num_row_groups):
        span = parquet.metadata.row_group(group).column(column).statistics
        if not pc.any(pc.and_(pc.greater_equal(wanted, span.min), pc.less_equal(wanted, span.max))).as_py():
            continue
        rows = parquet.read_row_group(group, columns=tables.TOKENS.names, use_threads=False).cast(tables.TOKENS)
        is_wanted = pc.is_in(rows["write_id"], wanted)
        if not pc.all(is_wanted).as_py():
            rows = rows.filter(is_wanted)
        if rows.num_rows:
            found.append(rows)
    return found


def _runs(rows: pa.Table) -> list[tuple[str, int, pa.Table]]:
    """The rows of each write as (write id, first segment, slice): ordering slices moves no blob."""
    encoded = pc.run_end_encode(rows["write_id"].combine_chunks())
    ends = encoded.run_ends.to_pylist()
    return [
        (write_id, rows["segment"][start].as_py(), rows.slice(start, end - start))
        for write_id, start, end in zip(encoded.values.to_pylist(), [0, *ends[:-1]], ends, strict=True)
    ]


def _each_once(rows: pa.Table) -> pa.Table:
    """Drop a segment that a repeated write named twice (its blobs are the same), and order what overlapped."""
    keys = rows.select(["write_id", "segment"])
    order = pc.sort_indices(keys, [("write_id", "ascending"), ("segment", "ascending")])
    ordered = keys.take(order).to_pylist()
    firsts = [i for i in range(len(ordered)) if i == 0 or ordered[i] != ordered[i - 1]]
    kept = order.take(pa.array(firsts, pa.int64()))
    return rows if kept.to_pylist() == list(range(rows.num_rows)) else rows.take(kept)
