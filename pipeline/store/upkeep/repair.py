"""What a check found damaged is taken out of a store, so that the next runs make again what it held."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.delta import create_table
from longvlm.pipeline.store.files import canonical, conformed, filesystem, write_pieces
from longvlm.pipeline.store.health import DamagedError, check_footer, look_into, reading, without
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.logfiles import replace_damaged_commits
from longvlm.pipeline.store.look import FORGOTTEN, Look
from longvlm.pipeline.store.snapshot import DataFile
from longvlm.pipeline.store.upkeep.tombstones import copy_tombstones, read_copies, remove_copy
from longvlm.pipeline.store.upkeep.verify import Verified, torn_writes
from longvlm.schemas import tables

T = TypeVar("T")
_SHARDED = ("tokens", "segments")  # made again from videos, each whole: of the other tables what can be read is kept
_DELETED = """
SELECT DISTINCT video_id, source, uri, 'deleted' AS status, $run_id AS run_id,
    now()::TIMESTAMPTZ AT TIME ZONE 'UTC' AS indexed_at
FROM live_videos SEMI JOIN damaged USING (write_id)
"""
# Copied tombstones of videos of which the ledger has no later deletion any more.
_LOST_TOMBSTONES = """
FROM copies ANTI JOIN ledger_videos l
ON l.video_id = copies.video_id AND l.status = 'deleted' AND l.seq >= copies.seq
"""
_UNCOPIED_TOMBSTONES = """
SELECT t.* FROM ledger_videos t JOIN (FROM deletions WHERE is_forgotten) USING (video_id)
ANTI JOIN copies USING (video_id) WHERE t.error_code = $tombstone
"""


@dataclass
class Repaired:
    """What a repair did."""

    videos: int = 0  # deleted, to be indexed again
    rows_lost: dict[str, int] = field(default_factory=dict)  # by table, of damaged files other than of tokens
    tombstones: int = 0  # of forgotten videos, lost with the ledger and taken from their copies
    commits: dict[str, str] = field(default_factory=dict)  # of logs, that were damaged or missing: see `mend_logs`

    @property
    def tables_hurt(self) -> set[str]:
        """The tables that may have lost rows."""
        return {*self.rows_lost, *(uri.rsplit("/", 3)[1] for uri in self.commits)}


def repair(store: Store, verified: Verified, run_id: str, commits: Mapping[str, str] | None = None) -> Repaired:
    """Drop what is damaged from the log, keeping what of it can be read, and delete the videos that lost tokens by it.

    They answer no more until they are indexed again, which the next run does, as with any deleted video whose file is
    there. One that was indexed again since it was verified stays. What the ledger lost the next run takes for new;
    forgotten videos stay forgotten. The files themselves stay for the retention.

    Args:
        store: opened by this process.
        verified: what came of a check of it.
        run_id: for the rows that delete.
        commits: that the logs lost: see `mend_logs`.

    Raises:
        CommitFailedError: another writer replaced a damaged file since.
        OSError: a file is out of reach.
    """
    repaired = Repaired(commits=dict(commits or {}))
    for table in filter(store.has, tables.TABLES):
        damaged = [file for file in store.pin((table,)).table(table).files if file.uri in verified.damaged_files]
        has_lost = table == "videos" and (damaged or table in repaired.tables_hurt)
        tombstones = _lost_tombstones(store, damaged) if has_lost else tables.VIDEOS.empty_table()
        if (damaged or tombstones.num_rows) and table not in _SHARDED:
            repaired.rows_lost[table] = _replace(store, table, damaged, tombstones)
            repaired.tombstones += tombstones.num_rows
    lost = [problem["write_id"] for problem in verified.problems]
    with catalog.connect(store.pin(("videos",)), ("live_videos",)) as con:
        repaired.videos = _delete(store, con, lost, run_id)
    for table in _SHARDED:
        _drop(store, table, verified)
    if "videos" in repaired.rows_lost:  # an older row may count again, whose tokens are gone
        repaired.videos += delete_torn(store, run_id)
    _renew_copies(store)
    return repaired


def mend_logs(store_uri: str) -> dict[str, str]:
    """Put commits that do nothing in the place of those of which a store's logs are damaged: see `logfiles`.

    Whatever these named the ledger misses then, or names though it is gone, which a check finds and a repair drops.

    Args:
        store_uri: as the command was given it; there may be no store.

    Returns:
        What was damaged: uri -> reason, in words.

    Raises:
        OSError: a log is out of reach, or may not be written.
    """
    mended: dict[str, str] = {}
    for table, schema in tables.TABLES.items():
        log_uri = f"{canonical(store_uri)}/{table}/_delta_log"
        fs, path = filesystem(log_uri)
        if fs.exists(path):
            mended |= replace_damaged_commits(log_uri, partial(_first_commit, schema))
    return mended


def _first_commit(schema: pa.Schema) -> bytes:
    """The content of the commit that makes a table."""
    with tempfile.TemporaryDirectory() as folder:
        create_table(folder, schema)
        return next(Path(folder, "_delta_log").glob("*.json")).read_bytes()


def delete_torn(store: Store, run_id: str) -> int:
    """Delete the live videos that lack any of their tokens or segments; returns how many are to be indexed again."""
    with catalog.connect(store.pin(("videos", "segments", "tokens")), ("live_videos",)) as con:
        return _delete(store, con, [torn["write_id"] for torn in torn_writes(con)], run_id)


def _drop(store: Store, table: str, verified: Verified) -> None:
    """Drop the damaged files of a table from its log."""
    damaged = [file for file in store.pin((table,)).table(table).files if file.uri in verified.damaged_files]
    if damaged:
        store.replace_files(table, damaged, [])


def _replace(store: Store, table: str, damaged: Sequence[DataFile], more: pa.Table) -> int:
    """Put what can be read of damaged files, and some more rows, in their place; returns how many rows are lost."""
    schema = store.columns(table)
    pieces = chain(
        *(_readable(table, file, schema) for file in damaged), [conformed(more, schema)] if more.num_rows else []
    )
    new = []
    if (first := next(pieces, None)) is not None:
        new.append(write_pieces(store.uri, table, schema, chain([first], pieces)))
    store.replace_files(table, damaged, new)
    num_kept = sum(json.loads(shard["stats"])["numRecords"] for shard in new) - more.num_rows
    return sum(file.num_rows for file in damaged) - num_kept


def _readable(table: str, file: DataFile, schema: pa.Schema) -> Iterator[pa.Table]:
    """The row groups of a file whose pages have their checksums; none where its footer is not its own."""

    def num_groups(source: Any) -> int:
        with reading(file.uri):
            parquet = pq.ParquetFile(source)
        check_footer(table, file, parquet)
        return int(parquet.num_row_groups)

    def read(group: int, source: Any) -> pa.Table:
        with reading(file.uri):
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
            return parquet.read_row_group(group, use_threads=False)

    for group in range(_unless_damaged(file.uri, num_groups) or 0):
        if (rows := _unless_damaged(file.uri, partial(read, group))) is not None:
            yield conformed(rows, schema)


def _unless_damaged(uri: str, look: Callable[[Any], T]) -> T | None:
    """As `look_into`; None where it is gone, or what is looked at is not what was written."""
    try:
        return look_into(uri, look)
    except (FileNotFoundError, DamagedError):
        return None


def _lost_tombstones(store: Store, damaged: Sequence[DataFile]) -> pa.Table:
    """The tombstones that stood in damaged files of the ledger alone, or were named by a commit that was lost."""
    copies, _ = read_copies(store.uri)
    with catalog.connect(without(store.pin(("videos",)), {file.uri: "" for file in damaged}), ()) as con:
        con.register("copies", copies)
        return con.sql(_LOST_TOMBSTONES).to_arrow_table().cast(tables.VIDEOS)


def _renew_copies(store: Store) -> None:
    """Copy the tombstones of which there is no copy that can be read, and remove copies that are damaged."""
    copies, damaged = read_copies(store.uri)
    with catalog.connect(store.pin(("videos",)), ("deletions",)) as con:
        con.register("copies", copies)
        uncopied = con.sql(_UNCOPIED_TOMBSTONES, params={"tombstone": FORGOTTEN}).to_arrow_table()
    copy_tombstones(store.uri, uncopied.cast(tables.VIDEOS))
    for uri in damaged:
        remove_copy(uri)


def _delete(store: Store, con: duckdb.DuckDBPyConnection, write_ids: Iterable[str], run_id: str) -> int:
    con.register("damaged", pa.table({"write_id": pa.array(write_ids, pa.string())}))
    sql = f"(FROM ledger_videos WHERE false) UNION ALL BY NAME ({_DELETED})"
    deleted = con.sql(sql, params={"run_id": run_id}).to_arrow_table().cast(tables.VIDEOS)
    ((seq,),) = con.execute("SELECT coalesce(max(seq), 0) FROM ledger_videos").fetchall()
    return deleted.num_rows - store.append("videos", deleted, Look(seq)).num_rows
