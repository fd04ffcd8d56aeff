"""Forgetting: every row of some videos leaves every file of a store, old versions too, and they are kept out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import CommitFailedError

from pipeline.store import catalog
from pipeline.store.files import filesystem
from pipeline.store.ledger import Store
from pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from pipeline.store.upkeep import rewrite
from pipeline.store.vacuum import unreferenced
from schemas import tables

_ERASED = (
    "tokens",
    "segments",
    "answers",
    "videos",
)  # the ledger last: an erasure that was cut off finds its way by it
_UNDER_WAY_HOURS = 1  # a file that no log names, and younger, may be about to be committed by a run
_TRIES = 8
_FORGOTTEN = "forgotten"

# Videos that shared a write, because one was moved and became the other, are one: round after round, until none is new.
_FAMILY = """
WITH RECURSIVE family AS (
    SELECT video_id FROM asked
    UNION
    SELECT b.video_id FROM family f JOIN ledger_videos a USING (video_id) JOIN ledger_videos b USING (write_id)
    WHERE a.status = 'indexed' AND b.status = 'indexed'
)
SELECT video_id FROM family
"""
_WRITES = "SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN family USING (video_id) WHERE write_id IS NOT NULL"
_TOMBSTONES = """
SELECT video_id, arg_max(source, seq) FILTER (source IS NOT NULL) AS source
FROM family LEFT JOIN ledger_videos USING (video_id)
WHERE video_id NOT IN (SELECT video_id FROM deletions WHERE is_forgotten)
GROUP BY video_id
"""


@dataclass
class Erased:
    """What was erased."""

    videos: int = 0
    rows: dict[str, int] = field(default_factory=dict)  # by table
    files_rewritten: int = 0
    files_deleted: int = 0
    bytes_deleted: int = 0
    files_under_way: int = 0  # of a run that has not committed them yet: they hold the videos still


@dataclass(frozen=True)
class _Family:
    """The videos to forget, and every write they ever had."""

    video_ids: pa.Array
    write_ids: pa.Array

    def without(self, table: str, rows: pa.Table) -> pa.Table:
        """The rows of others, and of the ledger the tombstones."""
        is_theirs = pc.is_in(rows["video_id"], self.video_ids)
        if "write_id" in rows.column_names:
            is_theirs = pc.or_(is_theirs, pc.is_in(rows["write_id"], self.write_ids))
        if table == "videos":
            is_tombstone = pc.equal(pc.fill_null(rows["error_code"], ""), _FORGOTTEN)
            is_theirs = pc.and_(is_theirs, pc.invert(is_tombstone))
        return rows.filter(pc.invert(is_theirs))


def unknown_videos(store: Store, video_ids: Sequence[str]) -> set[str]:
    """Which of some videos a store has never heard of."""
    with catalog.connect(store.pin(("videos",))) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        sql = "SELECT video_id FROM asked ANTI JOIN ledger_videos USING (video_id)"
        return {video for (video,) in con.execute(sql).fetchall()}


def erase(store: Store, video_ids: Sequence[str], run_id: str) -> Erased:
    """Forget videos: hide them, rewrite every file that holds a row of them, delete every old file.

    They leave the views with the first commit, whatever a run under way commits of them later. What readers pinned
    before is gone for them ("the shard is gone since the run began"). An erasure that was cut off is finished by the
    next one.

    Args:
        store: opened by this process.
        video_ids: known to the store.
        run_id: for the rows that keep them out.

    Raises:
        CommitFailedError: other writers kept coming in between.
    """
    family = _hide(store, video_ids, run_id)
    erased = Erased(len(family.video_ids), dict.fromkeys(_ERASED, 0))
    for table in _ERASED:
        _rewrite_holders(store, table, family, erased)
    for table in tables.TABLES:
        dropped = unreferenced(store, table, 0, full=False)
        _delete(store, table, dropped, erased)
        if table in _ERASED:
            _delete_abandoned(store, table, family, erased)
    return erased


def _hide(store: Store, video_ids: Sequence[str], run_id: str) -> _Family:
    """Write the rows that keep the videos out, and find all that is theirs."""
    with catalog.connect(store.pin(("videos",))) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        con.execute(f"CREATE TEMP TABLE family AS {_FAMILY}")
        family = con.sql("FROM family").to_arrow_table()["video_id"].combine_chunks()
        writes = con.sql(_WRITES).to_arrow_table()["write_id"].combine_chunks()
        tombstones = con.sql(_TOMBSTONES).to_arrow_table().to_pylist()
    rows = [{**row, "status": "deleted", "error_code": _FORGOTTEN, "run_id": run_id} for row in tombstones]
    store.append("videos", pa.Table.from_pylist(rows, tables.VIDEOS))
    return _Family(family, writes)


def _rewrite_holders(store: Store, table: str, family: _Family, erased: Erased) -> None:
    for attempt in range(_TRIES):
        pinned = store.pin((table,)).table(table)
        uris = _holders(table, [file.uri for file in pinned.files], family)
        holders = [file for file in pinned.files if file.uri in uris]
        if not holders:
            return
        try:
            done = rewrite(store, table, pinned.version, holders, partial(family.without, table))
        except CommitFailedError:
            if attempt + 1 == _TRIES:
                raise
        else:
            erased.files_rewritten += len(holders)
            erased.rows[table] += done.num_left_out
            return


def _holders(table: str, uris: list[str], family: _Family) -> set[str]:
    """Which files of a table hold rows of the family; only ids are read."""
    if not uris:
        return set()
    conditions = "video_id IN (SELECT video_id FROM family) OR write_id IN (SELECT write_id FROM writes)"
    if table == "videos":
        conditions = f"({conditions}) AND coalesce(error_code, '') <> '{_FORGOTTEN}'"
    files = Snapshot({table: PinnedTable(0, tuple(DataFile(uri, 0, 0) for uri in uris))})
    with catalog.connect(files) as con:
        con.register("family", pa.table({"video_id": family.video_ids}))
        con.register("writes", pa.table({"write_id": family.write_ids}))
        sql = f"SELECT DISTINCT filename FROM read_parquet({uris}, filename = true) WHERE {conditions}"
        return {uri for (uri,) in con.execute(sql).fetchall()}


def _delete_abandoned(store: Store, table: str, family: _Family, erased: Erased) -> None:
    """Files that the log never named and that hold the videos: deleted, unless a run may be about to name them."""
    root = f"{store.uri}/{table}"
    never_named = unreferenced(store, table, 0)
    holders = {uri.rpartition("/")[2] for uri in _holders(table, [f"{root}/{path}" for path in never_named], family)}
    if not holders:
        return
    old = unreferenced(store, table, _UNDER_WAY_HOURS)
    _delete(store, table, {path: num_bytes for path, num_bytes in old.items() if path in holders}, erased)
    erased.files_under_way += len(holders - set(old))


def _delete(store: Store, table: str, files: dict[str, int], erased: Erased) -> None:
    fs, root = filesystem(f"{store.uri}/{table}")
    for path, num_bytes in files.items():
        fs.rm_file(f"{root}/{path}")
        erased.files_deleted += 1
        erased.bytes_deleted += num_bytes
