"""Shards: the tokens and segments of many videos in closed parquet files, written by workers, read by write id."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longvlm.pipeline.store.files import conformed, filesystem, write_parquet
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError

_FOOTERS = 32  # kept: videos are read in the order of their ids, so from a few shards at a time; up to 1 MB each


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


def read_tokens(snapshot: Snapshot, write_ids: Iterable[str]) -> pa.Table:
    """The stored tokens of some videos, read from the row groups that hold them and no others.

    Files are pruned by the log's statistics, row groups by the file's; local files are memory-mapped. A handful of
    videos a call is read faster than one; `by_video` tells them apart.

    Returns:
        `tables.TOKENS`, ordered by write id and segment, each once; a write id without rows is absent.

    Raises:
        TerminalError: (not_found, bad_tokens) a file is gone since the snapshot was pinned, or is damaged. It may hold
            any of the videos: one a call, those in other files can still be read.
        OSError: a file is out of reach.
    """
    return _read(snapshot, "tokens", tables.TOKENS, write_ids)


SEARCHED = ("embedding", "frame_embeddings")  # columns of segments that are their vectors


def read_segments(snapshot: Snapshot, write_ids: Iterable[str], also: Sequence[str] = ()) -> pa.Table:
    """When the segments of some videos are, and what else is asked for, as `read_tokens` reads.

    Returns:
        write_id, segment, start_s, end_s, first_frame, last_frame, frames, times_s, and the columns named in `also`, as
        in `tables.SEGMENTS`.

    Raises:
        TerminalError, OSError: as `read_tokens`.
    """
    names = ["write_id", "segment", "start_s", "end_s", "first_frame", "last_frame", "frames", "times_s"]
    names += also
    return _read(snapshot, "segments", pa.schema([tables.SEGMENTS.field(name) for name in names]), write_ids)


def by_video(rows: pa.Table) -> dict[str, pa.Table]:
    """The rows of each write id, of rows that are ordered by it, without copying any blob."""
    spans = _spans(rows["write_id"].to_pylist())
    return {write_id: rows.slice(start, end - start) for write_id, start, end in spans}


class _Footer(NamedTuple):
    metadata: pq.FileMetaData
    spans: list[tuple[str, str]]  # first and last write id of each row group


class _RowRun(NamedTuple):
    """A run of consecutive rows of one write: ordering such runs moves no blob."""

    write_id: str
    segments: list[int]
    batch: pa.RecordBatch
    start: int  # in the batch
    end: int


def _read(snapshot: Snapshot, table: str, schema: pa.Schema, write_ids: Iterable[str]) -> pa.Table:
    wanted = sorted(set(write_ids))
    files = snapshot.files_for(table, wanted)
    runs = [run for file in files for run in _runs(_read_groups(file.uri, schema, wanted), set(wanted))]
    runs.sort(key=lambda run: (run.write_id, run.segments[0]))
    rows = pa.Table.from_batches(list(_joined(runs)), schema)
    keys = [(run.write_id, segment) for run in runs for segment in run.segments]
    if all(key < following for key, following in pairwise(keys)):
        return rows
    firsts = {key: row for row, key in reversed(list(enumerate(keys)))}  # a repeated write names equal blobs twice
    return rows.take([firsts[key] for key in sorted(firsts)])


def _read_groups(uri: str, schema: pa.Schema, wanted: list[str]) -> pa.Table:
    """The row groups of a file that may hold any of the wanted write ids, which are in order."""
    try:
        footer = _footer(uri)
        groups = [
            group
            for group, (first, last) in enumerate(footer.spans)
            if first <= wanted[-1] and wanted[0] <= last and _any_within(wanted, first, last)
        ]
        if not groups:
            return schema.empty_table()
        with _opened(uri, footer.metadata) as parquet:
            return conformed(parquet.read_row_groups(groups, columns=schema.names, use_threads=False), schema)
    except FileNotFoundError as error:
        reason = f"the shard {uri} is gone since the run began (vacuumed?); run again."
        raise TerminalError(ErrorCode.NOT_FOUND, reason) from error
    except pa.ArrowInvalid as error:
        reason = f"the shard {uri} is damaged ({error}); index its videos again."
        raise TerminalError(ErrorCode.BAD_TOKENS, reason) from error


def _any_within(ordered: list[str], first: str, last: str) -> bool:
    at = bisect_left(ordered, first)
    return at < len(ordered) and ordered[at] <= last


@lru_cache(maxsize=_FOOTERS)
def _footer(uri: str) -> _Footer:
    """What a file says of its row groups; parsing it takes as long as reading two videos."""
    with _opened(uri) as parquet:
        column = parquet.schema_arrow.get_field_index("write_id")
        groups = (parquet.metadata.row_group(group) for group in range(parquet.num_row_groups))
        spans = [(span.min, span.max) for group in groups if (span := group.column(column).statistics)]
        return _Footer(parquet.metadata, spans)


@contextmanager
def _opened(uri: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    if is_local(uri):
        with pq.ParquetFile(uri, memory_map=True, metadata=metadata) as parquet:
            yield parquet
        return
    fs, path = filesystem(uri)
    with fs.open(path, "rb", cache_type="none") as remote:  # pre_buffer asks for exactly the ranges it needs
        yield pq.ParquetFile(remote, pre_buffer=True, metadata=metadata)


def _runs(rows: pa.Table, wanted: set[str]) -> Iterator[_RowRun]:
    """The wanted rows; of a row group that several videos share, only theirs."""
    for batch in rows.to_batches():
        segments = batch["segment"].to_pylist()
        for write_id, start, end in _spans(batch["write_id"].to_pylist()):
            if write_id in wanted:
                yield _RowRun(write_id, segments[start:end], batch, start, end)


def _joined(runs: list[_RowRun]) -> Iterator[pa.RecordBatch]:
    """The rows of all runs in order, in one piece what lies in one: videos of a piece can be looked at together."""
    at = 0
    while at < len(runs):
        batch, start, end = runs[at].batch, runs[at].start, runs[at].end
        at += 1
        while at < len(runs) and runs[at].batch is batch and runs[at].start == end:
            end = runs[at].end
            at += 1
        yield batch.slice(start, end - start)


def _spans(values: list[str]) -> Iterator[tuple[str, int, int]]:
    """Runs of equal values: the value, where it starts and where it ends."""
    end = 0
    for value, run in groupby(values):
        start, end = end, end + len(list(run))
        yield value, start, end
