"""Forgetting: every row of some videos leaves every file of a store, old versions too, and they are kept out."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import filesystem
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.store.upkeep.compact import batches, rewrite
from longvlm.pipeline.store.upkeep.dead import recent_files
from longvlm.pipeline.store.upkeep.vacuum import unreferenced
from longvlm.schemas import tables

_ERASED = (
    "tokens",
    "segments",
    "verdicts",
    "answers",
    "videos",
)  # the ledger last: an erasure that was cut off finds its way by it
_UNDER_WAY_HOURS = 1  # a file that no log names, and younger, may be about to be committed by a run
_TRIES = 8
_FORGOTTEN = "forgotten"

# A video that was moved shares its writes with the name it has now and with those it had before. All that stands under
# such a name goes too, unless another video is live under it now; what lives on elsewhere, being another video, stays.
_FAMILY = """
CREATE TEMP TABLE named_writes AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN asked USING (video_id) WHERE write_id IS NOT NULL;

CREATE TEMP TABLE family AS
FROM asked UNION SELECT video_id FROM ledger_videos SEMI JOIN named_writes USING (write_id)
ANTI JOIN (SELECT video_id FROM live_videos ANTI JOIN named_writes USING (write_id)) USING (video_id);

CREATE TEMP TABLE spared AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN family USING (video_id)
SEMI JOIN (SELECT write_id FROM live_videos ANTI JOIN family USING (video_id)) USING (write_id)
ANTI JOIN named_writes USING (write_id);

CREATE TEMP TABLE writes AS
FROM named_writes UNION SELECT write_id FROM ledger_videos SEMI JOIN family USING (video_id)
ANTI JOIN spared USING (write_id) WHERE write_id IS NOT NULL;
"""
# Which rows of a table are a family's: of the ledger all of their own, but for the tombstones. As `_Family.are_theirs`.
_THEIRS = {
    table: f"""
    (video_id IN (SELECT video_id FROM family) AND NOT coalesce({spared}, false))
    OR write_id IN (SELECT write_id FROM writes)
    """
    for table in _ERASED
    for spared in [f"error_code = '{_FORGOTTEN}'" if table == "videos" else "write_id IN (SELECT write_id FROM spared)"]
}
# Who is kept out: the videos themselves, and the names under which they are live now.
_TOMBSTONES = """
SELECT video_id, arg_max(source, seq) FILTER (source IS NOT NULL) AS source
FROM (FROM asked UNION SELECT video_id FROM live_videos SEMI JOIN named_writes USING (write_id))
LEFT JOIN ledger_videos USING (video_id)
WHERE video_id NOT IN (SELECT video_id FROM deletions WHERE is_forgotten)
GROUP BY video_id
"""
# What a run that was under way committed of them since: videos rows that are newer, and rows of writes without any.
_LEFT_OVER = """
WITH forgotten AS (SELECT video_id, deleted_at[1] AS seq FROM deletions WHERE is_forgotten)
SELECT v.video_id FROM ledger_videos v JOIN forgotten f USING (video_id) WHERE v.status <> 'deleted' AND v.seq > f.seq
UNION
SELECT video_id FROM (
    SELECT video_id, write_id FROM ledger_tokens
    UNION ALL SELECT video_id, write_id FROM ledger_segments
    UNION ALL SELECT video_id, write_id FROM ledger_answers
    UNION ALL SELECT video_id, write_id FROM ledger_verdicts
) SEMI JOIN forgotten USING (video_id) ANTI JOIN (SELECT write_id FROM ledger_videos) USING (write_id)
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
    """Whose rows go: those of some videos, and of some writes under whatever name."""

    video_ids: pa.Array
    write_ids: pa.Array
    spared: pa.Array  # writes that are live under other names

    def register(self, con: duckdb.DuckDBPyConnection) -> None:
        """Show it to a database, as `_THEIRS` reads it."""
        con.register("family", pa.table({"video_id": self.video_ids}))
        con.register("writes", pa.table({"write_id": self.write_ids}))
        con.register("spared", pa.table({"write_id": self.spared}))

    def are_theirs(self, table: str, rows: pa.Table) -> pa.ChunkedArray:
        """Which rows of a table go; of the ledger all of their own, but for the tombstones."""
        is_own = pc.is_in(rows["video_id"], self.video_ids)
        if table == "videos":
            is_own = pc.and_(is_own, pc.not_equal(pc.fill_null(rows["error_code"], ""), _FORGOTTEN))
        else:
            is_own = pc.and_not(is_own, pc.is_in(rows["write_id"], self.spared))
        return pc.or_(is_own, pc.is_in(rows["write_id"], self.write_ids))

    def without(self, table: str, rows: pa.Table) -> pa.Table:
        """The rows of others."""
        return rows.filter(pc.invert(self.are_theirs(table, rows)))


def unknown_videos(store: Store, video_ids: Sequence[str]) -> set[str]:
    """Which of some videos a store has never heard of."""
    with catalog.connect(store.pin(("videos",))) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        sql = "SELECT video_id FROM asked ANTI JOIN ledger_videos USING (video_id)"
        return {video for (video,) in con.execute(sql).fetchall()}


@dataclass(frozen=True)
class Foreseen:
    """What an erasure would take."""

    uris: list[str]  # under which the videos are or were known, in alphabetical order
    rows: dict[str, int]  # by table


def foresee(store: Store, video_ids: Sequence[str]) -> Foreseen:
    """What forgetting videos known to the store would take from it as it is now."""
    snapshot = store.pin(_ERASED)
    family, _ = _find(snapshot, video_ids)
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")})) as con:
        family.register(con)
        uris = con.execute("SELECT DISTINCT uri FROM ledger_videos SEMI JOIN family USING (video_id) ORDER BY uri")
        named = [uri for (uri,) in uris.fetchall() if uri]
        rows = {}
        for table in _ERASED:
            files = catalog.rows_of(file.uri for file in snapshot.table(table).files)
            counted = f"SELECT count(*) FROM {files} WHERE {_THEIRS[table]}"
            ((rows[table],),) = con.execute(counted).fetchall() if snapshot.table(table).files else [(0,)]
    return Foreseen(named, rows)


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
    for table in filter(store.has, tables.TABLES):
        dropped = unreferenced(store, table, 0, full=False)
        _delete(store, table, dropped, erased)
        if table in _ERASED:
            _delete_abandoned(store, table, family, erased)
    return erased


def left_over(store: Store, retention_hours: float) -> list[str]:
    """Forgotten videos of which rows are there again: a run that was under way committed them later.

    Looked through are the ledger, all answers and verdicts, and the tokens and segments of the last two weeks.
    """
    snapshot = store.pin(_ERASED)
    recent = {table: PinnedTable(0, files) for table, files in recent_files(snapshot, retention_hours).items()}
    with catalog.connect(Snapshot({"videos": snapshot.table("videos"), **recent})) as con:
        if not con.execute("FROM deletions WHERE is_forgotten LIMIT 1").fetchall():
            return []
        return sorted(video for (video,) in con.execute(_LEFT_OVER).fetchall())


def _find(snapshot: Snapshot, video_ids: Sequence[str]) -> tuple[_Family, pa.Table]:
    """All that is theirs, and who is to be kept out (video_id, source)."""
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")})) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        con.execute(_FAMILY)
        found = [con.sql(f"FROM {name}").to_arrow_table()[0] for name in ("family", "writes", "spared")]
        return _Family(*(column.combine_chunks() for column in found)), con.sql(_TOMBSTONES).to_arrow_table()


def _hide(store: Store, video_ids: Sequence[str], run_id: str) -> _Family:
    """Write the rows that keep the videos out, and find all that is theirs."""
    family, tombstones = _find(store.pin(("videos",)), video_ids)
    said = {"status": "deleted", "error_code": _FORGOTTEN, "run_id": run_id}
    store.append("videos", pa.Table.from_pylist([{**row, **said} for row in tombstones.to_pylist()], tables.VIDEOS))
    return family


def _rewrite_holders(store: Store, table: str, family: _Family, erased: Erased) -> None:
    """Rewrite the files of a table until none holds the videos; those of the ledger, by which all is found, at once."""
    num_conflicts = 0
    while holders := _holders(table, store.pin((table,)).table(table).files, family):
        try:
            for group in [holders] if table == "videos" else batches(holders):
                pinned = store.pin((table,)).table(table)
                if not set(group) <= set(pinned.files):
                    break  # merged by another one: look again
                done = rewrite(store, table, pinned.version, group, partial(family.without, table), checked=False)
                erased.files_rewritten += len(group)
                erased.rows[table] += done.num_left_out
        except CommitFailedError:
            num_conflicts += 1
            if num_conflicts == _TRIES:
                raise


def _holders(table: str, files: tuple[DataFile, ...], family: _Family) -> list[DataFile]:
    """Which files of a table hold rows of the family; only ids are read."""
    if not files:
        return []
    with catalog.connect(Snapshot({table: PinnedTable(0, files)})) as con:
        family.register(con)
        rows = catalog.rows_of(file.uri for file in files)
        sql = f"SELECT DISTINCT filename FROM {rows} WHERE {_THEIRS[table]}"
        found = {uri for (uri,) in con.execute(sql).fetchall()}
    return [file for file in files if file.uri in found]


def _delete_abandoned(store: Store, table: str, family: _Family, erased: Erased) -> None:
    """Files that the log never named and that hold the videos: deleted, unless a run may be about to name them."""
    holders = {path for path in unreferenced(store, table, 0) if _may_hold(store, table, path, family)}
    if not holders:
        return
    old = unreferenced(store, table, _UNDER_WAY_HOURS)
    _delete(store, table, {path: num_bytes for path, num_bytes in old.items() if path in holders}, erased)
    erased.files_under_way += len(holders - set(old))


def _may_hold(store: Store, table: str, path: str, family: _Family) -> bool:
    """Whether a file has rows of the family, or cannot be read, as one whose writer is at it or was killed at it."""
    fs, root = filesystem(f"{store.uri}/{table}")
    names = ["video_id", "write_id", *(["error_code"] if table == "videos" else [])]
    try:
        with fs.open(f"{root}/{path}", "rb") as source:
            rows = pq.read_table(source, columns=names)
    except FileNotFoundError:  # vacuumed meanwhile
        return False
    except (OSError, pa.ArrowException):
        return True
    return bool(pc.any(family.are_theirs(table, rows)).as_py())


def _delete(store: Store, table: str, files: dict[str, int], erased: Erased) -> None:
    fs, root = filesystem(f"{store.uri}/{table}")
    for path, num_bytes in files.items():
        with contextlib.suppress(FileNotFoundError):  # another one is at it too
            fs.rm_file(f"{root}/{path}")
            erased.files_deleted += 1
            erased.bytes_deleted += num_bytes
