"""Whether what a store says is live is really there: every file readable, every token of every video in its place."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.health import (
    DamagedError,
    check_footer,
    damaged_files,
    look_into,
    reading,
    without,
)
from longvlm.pipeline.store.logfiles import log_damage
from longvlm.pipeline.store.snapshot import DataFile, Snapshot
from longvlm.pipeline.store.upkeep.tombstones import read_copies
from longvlm.schemas.recipe import CHANNELS_PER_SCALE

_COUNTED = ("tokens", "segments")
# What the queries below ask about: the view is made of the whole ledger again by each query over it.
_LIVE = "CREATE TEMP TABLE live AS SELECT uri, write_id, num_segments FROM live_videos"
# Live videos whose rows in a table are not the segments 0 to num_segments - 1, each once.
_WRONG_SEGMENTS = """
SELECT v.uri, v.write_id, '{table}' AS "table",
    'has ' || coalesce(r.num_rows, 0) || ' segments of ' || v.num_segments ||
    CASE WHEN r.num_rows > r.num_different THEN ', some repeated' ELSE '' END AS problem
FROM live v LEFT JOIN (
    SELECT write_id, count(*) AS num_rows, count(DISTINCT segment) AS num_different,
        min(segment) AS first, max(segment) AS last
    FROM ledger_{table} GROUP BY write_id
) r USING (write_id)
WHERE r.num_rows IS DISTINCT FROM v.num_segments OR r.num_different <> v.num_segments OR r.first <> 0
    OR r.last <> v.num_segments - 1
"""
_TWICE = """
SELECT any_value(uri) AS uri, write_id, 'videos' AS "table", 'is live ' || count(*) || ' times' AS problem
FROM live GROUP BY write_id HAVING count(*) > 1
"""
_OF_LIVE = """
SELECT v.uri, p.write_id, p."table", p.problem
FROM found p JOIN (SELECT DISTINCT write_id, uri FROM live) v USING (write_id)
"""


@dataclass(frozen=True)
class Verified:
    """What a check found."""

    num_videos: int  # live, under all recipes
    num_files: int
    num_bytes: int
    damaged_files: dict[str, str]  # uri -> what is wrong
    problems: list[dict[str, Any]]  # uri, write_id, table, problem: a row a live video and thing that is wrong


def verify(snapshot: Snapshot, progress: Callable[[int], None] = lambda _: None) -> Verified:
    """Read every byte of a store's tables, and hold tokens and segments against what is live.

    Checked are footers and what they say of the rows, the checksums of the pages (of files written with them), the
    lengths of the blobs against num_tokens, dim and dtype, the logs' own files since their newest checkpoints, the
    copies of tombstones, and that each live video has each of its segments once in both tables. No more than a row
    group is in memory at a time. What a damaged file of `videos` says is live is not known: it is told by the file
    alone.

    Args:
        snapshot: from `Store.pin`.
        progress: called with the bytes of each file that was read.

    Raises:
        OSError: a file is out of reach, which is not its fault.
    """
    damaged: dict[str, str] = {}
    found: list[dict[str, Any]] = []
    for table, pinned in snapshot.tables.items():
        for file in pinned.files:
            try:
                found += look_into(file.uri, partial(_check_file, table, file))
            except FileNotFoundError:
                damaged[file.uri] = "it is gone"
            except DamagedError as error:
                damaged[file.uri] = error.reason
            progress(file.size_bytes)
    for root in {file.uri.rsplit("/", 2)[0] for pinned in snapshot.tables.values() for file in pinned.files}:
        for table in snapshot.tables:  # also one without files: its log may have lost them
            with contextlib.suppress(FileNotFoundError):
                damaged |= log_damage(f"{root}/{table}/_delta_log")
        damaged |= read_copies(root)[1]
    damaged |= damaged_files(without(snapshot, damaged), with_statistics=True)
    asked = Snapshot({table: snapshot.table(table) for table in ("videos", *_COUNTED)})
    with catalog.connect(without(asked, damaged), ("live_videos",)) as con:
        con.register("found", pa.Table.from_pylist(found, _FOUND))
        problems = torn_writes(con)
        problems += [row for sql in (_OF_LIVE, _TWICE) for row in con.sql(sql).to_arrow_table().to_pylist()]
        ((num_videos,),) = con.execute("SELECT count(*) FROM live").fetchall()
    files = [file for pinned in snapshot.tables.values() for file in pinned.files]
    return Verified(num_videos, len(files), sum(file.size_bytes for file in files), damaged, problems)


def torn_writes(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """The problems (see `Verified`) of live videos that do not have each of their segments once in both tables.

    Leaves in the connection what is live, as the table `live`.
    """
    con.execute(_LIVE)
    queries = [_WRONG_SEGMENTS.format(table=table) for table in _COUNTED]
    return [row for sql in queries for row in con.sql(sql).to_arrow_table().to_pylist()]


_FOUND = pa.schema([("write_id", pa.string()), ("table", pa.string()), ("problem", pa.string())])


def _check_file(table: str, file: DataFile, source: Any) -> list[dict[str, Any]]:
    """What is wrong with rows of a file; raises DamagedError where the file itself is not what was written."""
    problems: list[dict[str, Any]] = []
    with reading(file.uri):
        parquet = pq.ParquetFile(source, page_checksum_verification=True)
    check_footer(table, file, parquet)
    for group in range(parquet.num_row_groups):
        with reading(file.uri):
            rows = parquet.read_row_group(group, use_threads=False)
            rows.validate(full=True)
        _check_statistics(file, parquet.metadata.row_group(group), rows)
        if table == "tokens":
            problems += _wrong_blobs(rows)
    return problems


def _check_statistics(file: DataFile, group: pq.RowGroupMetaData, rows: pa.Table) -> None:
    """Raise DamagedError where a footer says of a row group what its rows do not have: SQL leaves out rows by it."""
    for number in range(group.num_columns):
        with reading(file.uri):
            chunk = group.column(number)
            name, said = chunk.path_in_schema, chunk.statistics
            if said is None or name not in rows.column_names:
                continue
            ends, num_nulls = pc.min_max(rows[name]).as_py(), rows[name].null_count
            said_ends = (said.min, said.max) if said.has_min_max else None
            said_numbers = chunk.num_values, said.null_count
        is_right = said_numbers in ((rows.num_rows, None), (rows.num_rows, num_nulls))
        if not is_right or said_ends not in (None, (ends["min"], ends["max"])):
            raise DamagedError(file.uri, f"its footer says of the column {name} what its rows do not have")


def _wrong_blobs(rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of tables.TOKENS whose blobs are not as long as their shapes say."""
    num_tokens, dim, width = rows["num_tokens"], rows["dim"], pc.multiply(rows["dim"], 2)
    is_int8 = pc.equal(rows["dtype"], "int8")
    per_token = {"local": pc.if_else(is_int8, dim, width), "sizes": 2, "spans": 8}
    checks = [pc.or_(is_int8, pc.equal(rows["dtype"], "float16"))]
    if "scales" in rows.column_names:  # older files have none
        num_scales = pc.divide(pc.add(dim, CHANNELS_PER_SCALE - 1), CHANNELS_PER_SCALE)
        scale_bytes = pc.multiply(num_tokens, pc.multiply(pc.if_else(is_int8, num_scales, 0), 2))
        checks.append(pc.equal(pc.fill_null(pc.binary_length(rows["scales"]), 0), scale_bytes))
    else:
        checks.append(pc.invert(is_int8))
    checks += [
        pc.equal(pc.binary_length(rows[name]), pc.multiply(num_tokens, size)) for name, size in per_token.items()
    ]
    cls_bytes = pc.fill_null(pc.binary_length(rows["cls"]), 0)
    checks.append(pc.equal(pc.multiply(pc.divide(cls_bytes, pc.max_element_wise(width, 1)), width), cls_bytes))
    if "positions" in rows.column_names:  # older files have none
        is_long = pc.equal(pc.binary_length(rows["positions"]), pc.multiply(num_tokens, 24))
        checks.append(pc.or_kleene(pc.is_null(rows["positions"]), is_long))
    wrong = rows.filter(pc.invert(pc.fill_null(reduce(pc.and_, checks), False)))  # noqa: FBT003 - a value, not a flag
    for write_id, segment in zip(wrong["write_id"].to_pylist(), wrong["segment"].to_pylist(), strict=True):
        problem = f"the blobs of segment {segment} are not as long as its shape says"
        yield {"write_id": write_id, "table": "tokens", "problem": problem}
