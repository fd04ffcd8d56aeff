"""Forgetting: every row of some videos leaves every file of a store, old versions too, and that is proved."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from longvlm.pipeline.store import catalog, delta
from longvlm.pipeline.store.files import files_on_disk, remove_files
from longvlm.pipeline.store.health import (
    DamagedError,
    OutOfReachError,
    look_into,
    reading,
    rotten_columns,
    why_damaged,
)
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import FORGOTTEN, PROVED, Look
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.store.upkeep.compact import batches, rewrite
from longvlm.pipeline.store.upkeep.dead import recent_files
from longvlm.pipeline.store.upkeep.family import ERASED, THEIRS, VideoFamily, find_family, looking_at_all
from longvlm.pipeline.store.upkeep.repair import delete_torn
from longvlm.pipeline.store.upkeep.tombstones import copy_tombstones
from longvlm.pipeline.store.upkeep.vacuum import unreferenced
from longvlm.pipeline.store.upkeep.versions import delete_old_versions
from longvlm.schemas import clock, tables

_TRIES = 8
_IDS = ["video_id", "write_id"]
# Forgotten videos whose erasure was not proved, and those of which there are rows that are not tombstones, whoever
# wrote them and when. What is live under another name is another video's.
_LEFT_OVER = """
WITH forgotten AS (SELECT video_id FROM deletions WHERE is_forgotten)
SELECT video_id FROM ledger_videos SEMI JOIN forgotten USING (video_id) WHERE error_code = $tombstone
GROUP BY video_id HAVING arg_max(coalesce(error, ''), seq) <> $proof
UNION
SELECT video_id FROM ledger_videos SEMI JOIN forgotten USING (video_id) WHERE coalesce(error_code, '') <> $tombstone
UNION
SELECT video_id FROM (
    SELECT video_id, write_id FROM ledger_tokens
    UNION ALL SELECT video_id, write_id FROM ledger_segments
    UNION ALL SELECT video_id, write_id FROM ledger_answers
    UNION ALL SELECT video_id, write_id FROM ledger_verdicts
) SEMI JOIN forgotten USING (video_id) ANTI JOIN (SELECT write_id FROM live_videos) USING (write_id)
"""
_NAMED = """
SELECT DISTINCT uri FROM ledger_videos SEMI JOIN (FROM kept_out UNION FROM vacant) USING (video_id)
WHERE uri <> '' ORDER BY uri
"""
# Of those tombstones upon which the erasure rests: later ones are of others, who have not proved theirs yet.
_PROOF = """
SELECT * REPLACE ($proof AS error, $run_id AS run_id) FROM (
    FROM ledger_videos SEMI JOIN kept_out USING (video_id)
    WHERE error_code = $tombstone QUALIFY row_number() OVER (PARTITION BY video_id ORDER BY seq DESC) = 1
) WHERE error IS DISTINCT FROM $proof AND seq <= (SELECT seq FROM looked)
"""

logger = logging.getLogger(__name__)


@dataclass
class Erased:
    """What was erased, and what could not be."""

    videos: int = 0
    rows: dict[str, int] = field(default_factory=dict)  # by table
    files_rewritten: int = 0
    files_deleted: int = 0
    bytes_deleted: int = 0
    versions_deleted: int = 0  # of deleted files, which a bucket had kept
    videos_torn: int = 0  # others', which lost rows that could not be read: to be indexed again
    still_there: list[str] = field(default_factory=list)  # what holds the videos still, or may: sentences


def unknown_videos(store: Store, video_ids: Sequence[str]) -> set[str]:
    """Which of some videos a store has never heard of."""
    with catalog.connect(store.pin(("videos",)), ()) as con:
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
    snapshot = store.pin(ERASED)
    family, _ = find_family(snapshot, video_ids)
    family = family.with_writes(family.not_live(snapshot))
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")}), ()) as con:
        family.register(con)
        named = [uri for (uri,) in con.execute(_NAMED).fetchall()]
        rows = {}
        for table in ERASED:
            files = catalog.rows_of(file.uri for file in snapshot.table(table).files)
            counted = f"SELECT count(*) FROM {files} WHERE {THEIRS[table]}"
            ((rows[table],),) = con.execute(counted).fetchall() if snapshot.table(table).files else [(0,)]
    return Foreseen(named, rows)


def erase(store: Store, video_ids: Sequence[str], run_id: str) -> Erased:
    """Forget videos: hide them, rewrite every file that holds a row of them, delete every old file, and prove it.

    They leave the views with the first commit, and nothing of them is committed after it, whatever a run under way has
    read or written before. What readers pinned before is gone for them ("the shard is gone since the run began"). An
    erasure that was cut off is finished by the next one, or by the next maintenance.

    Args:
        store: opened by this process.
        video_ids: known to the store.
        run_id: for the rows that keep them out.

    Raises:
        CommitFailedError: other writers kept coming in between.
    """
    family = _hide(store, video_ids, run_id)
    erased = Erased(family.num_names, dict.fromkeys(ERASED, 0))
    damaged: dict[str, str] = {}
    *first, ledger = filter(store.has, ERASED)
    for table in (*first, ledger):
        # With the note that this begins with, every commit to the table from now on is one that knows the tombstones,
        # and what was written under their names before is named by now, or never will be.
        _delete_unnamed(store, table, family, erased)
    for table in first:
        _rewrite_rotten(store, table, erased, damaged)
    with store.taking("videos", lambda _: family.not_live(store.pin(ERASED))) as not_live:
        family = family.with_writes(not_live)
        for table in first:
            _erase_from(store, table, family, erased, damaged)
        # a rewrite of a ledger that rotted would lose the tombstones of others
        left = [*_still_there(store, family, first), *_told(_rotten(store, ledger))]
        if not left:
            _erase_from(store, ledger, family, erased, damaged)
    for table in set(filter(store.has, tables.TABLES)) - set(ERASED):
        _delete(store, table, unreferenced(store, table, 0, full=False), erased)
    if damaged:
        erased.videos_torn = delete_torn(store, run_id)
    erased.versions_deleted, kept = delete_old_versions(store.uri, ERASED)
    erased.still_there = [*kept, *(left or _still_there(store, family, [*first, ledger]))]
    if not erased.still_there:
        _note_proof(store, family, run_id)
    return erased


def left_over(store: Store, retention_hours: float) -> list[str]:
    """Forgotten videos of which something is there still, or again.

    That is, whose erasure was cut off; or of which there are rows in the ledger, in answers, in verdicts, or in the
    tokens and segments of the last two weeks.
    """
    snapshot = store.pin(ERASED)
    recent = {table: PinnedTable(0, files) for table, files in recent_files(snapshot, retention_hours).items()}
    with looking_at_all(Snapshot({"videos": snapshot.table("videos"), **recent}), ("live_videos",)) as con:
        if not con.execute("FROM deletions WHERE is_forgotten LIMIT 1").fetchall():
            return []
        found = con.execute(_LEFT_OVER, {"tombstone": FORGOTTEN, "proof": PROVED}).fetchall()
    return sorted(video for (video,) in found)


def _hide(store: Store, video_ids: Sequence[str], run_id: str) -> VideoFamily:
    """Write the rows that keep the videos out, and find all that is theirs."""
    while True:
        pinned = store.pin(("videos",))
        family, tombstones = find_family(pinned, video_ids)
        if not tombstones.num_rows:
            return family
        seq = max(clock.now_us(), pinned.newest_seq("videos") + 1)
        said = {"status": "deleted", "error_code": FORGOTTEN, "run_id": run_id, "seq": seq}
        rows = pa.Table.from_pylist([{**row, **said} for row in tombstones.to_pylist()], tables.VIDEOS)
        copy_tombstones(store.uri, rows)
        store.append("videos", rows)  # and once more for a name to which one of them was moved meanwhile


def _note_proof(store: Store, family: VideoFamily, run_id: str) -> None:
    """Write once more the rows that keep the videos out, as those of videos of which nothing is left."""
    pinned = store.pin(("videos",))
    with catalog.connect(pinned, ()) as con:
        family.register(con)
        values = {"tombstone": FORGOTTEN, "proof": PROVED, "run_id": run_id}
        proof = con.sql(_PROOF, params=values).to_arrow_table().cast(tables.VIDEOS)
    store.append("videos", proof, Look(pinned.newest_seq("videos")))  # where another proved it, it may be lifted by now


def _erase_from(store: Store, table: str, family: VideoFamily, erased: Erased, damaged: dict[str, str]) -> None:
    """Let the videos leave the files that a table's log names, and delete those that it dropped."""
    _rewrite_holders(store, table, family, erased, damaged)
    _delete(store, table, unreferenced(store, table, 0, full=False), erased)
    if _unnamed_holders(store, table, family, store.handle(table)):
        _delete_unnamed(store, table, family, erased)


def _delete_unnamed(store: Store, table: str, family: VideoFamily, erased: Erased) -> None:
    """Delete the files that the log does not name and that hold the videos, or may; no commit will name them."""
    with store.taking(table, partial(_unnamed_holders, store, table, family)) as holders:
        _delete(store, table, holders, erased)


def _rewrite_holders(store: Store, table: str, family: VideoFamily, erased: Erased, damaged: dict[str, str]) -> None:
    """Rewrite the files of a table until none holds the videos; those of the ledger, by which all is found, at once.

    Row groups that cannot be read, or whose pages do not have their checksums, are left out: a copy would make them
    right, and nobody can say whose they are.
    """
    num_conflicts = 0
    while holders := family.holders(table, store.pin((table,)).table(table).files):
        try:
            for group in [holders] if table == "videos" else batches(holders):
                pinned = store.pin((table,)).table(table)
                if not set(group) <= set(pinned.files):
                    break  # merged by another one: look again
                keep = partial(family.without, table)
                done = rewrite(store, table, group, keep, damaged=damaged)
                erased.files_rewritten += len(group)
                erased.rows[table] += done.num_left_out
        except CommitFailedError:
            num_conflicts += 1
            if num_conflicts == _TRIES:
                raise
    for uri, reason in damaged.items():
        logger.warning("%s was damaged (%s); what of it could not be read is gone", uri, reason)


def _rewrite_rotten(store: Store, table: str, erased: Erased, damaged: dict[str, str]) -> None:
    """Rewrite the files of a table whose ids rotted: which of their rows are the videos' nobody can say any more."""
    num_conflicts = 0
    while rotten := _rotten(store, table):
        try:
            erased.files_rewritten += len(rotten)
            erased.rows[table] += rewrite(store, table, [*rotten], lambda rows: rows, damaged=damaged).num_left_out
        except CommitFailedError:
            num_conflicts += 1
            if num_conflicts == _TRIES:
                raise


def _rotten(store: Store, table: str) -> dict[DataFile, str]:
    """Files that the log names whose rows cannot be told by their ids, and why; of the ledger, by any column."""
    files = store.pin((table,)).table(table).files
    found = rotten_columns(files, None if table == "videos" else _IDS)
    return {file: found[file.uri] for file in files if file.uri in found}


def _unnamed_holders(store: Store, table: str, family: VideoFamily, handle: DeltaTable) -> dict[str, int]:
    """Files on the disk that the log does not name and that hold the videos, or may; with their bytes.

    Dropped ones are among them if a clock was ahead of ours, and those of runs that are under way or died.
    """
    holders, _ = _look_into_unnamed(store, table, family, handle)
    return holders


def _look_into_unnamed(
    store: Store, table: str, family: VideoFamily, handle: DeltaTable
) -> tuple[dict[str, int], dict[str, str]]:
    """As `_unnamed_holders`; and why files that the log does not name could not be looked into, by their names."""
    on_disk = files_on_disk(f"{store.uri}/{table}")
    holders, out_of_reach = {}, {}
    for path in sorted(on_disk.keys() - delta.names(handle)):
        try:
            if _may_hold(store, table, path, family):
                holders[path] = on_disk[path]
        except OutOfReachError as error:
            out_of_reach[path] = why_damaged(error)
    return holders, out_of_reach


def _may_hold(store: Store, table: str, path: str, family: VideoFamily) -> bool:
    """Whether rows of a file may be theirs, or it is no whole one, as where its writer is at it or was killed at it.

    Raises OutOfReachError where its bytes cannot be had, which says nothing about them.
    """
    names = ["video_id", "write_id", *(["uri", "error_code", "seq"] if table == "videos" else [])]
    uri = f"{store.uri}/{table}/{path}"

    def read(source: Any) -> pa.Table:
        with reading(uri):
            return pq.read_table(source, columns=names, page_checksum_verification=True)

    try:
        rows = look_into(uri, read)
    except FileNotFoundError:  # vacuumed meanwhile
        return False
    except DamagedError:  # half a file, or a rotten one
        return True
    return bool(pc.any(family.may_be_theirs(table, rows)).as_py())


def _still_there(store: Store, family: VideoFamily, some: Sequence[str]) -> list[str]:
    """The proof: every file of some tables is looked into once more, those that no log names too."""
    found: list[str] = []
    for table in some:
        named = family.holders(table, store.pin((table,)).table(table).files)
        found += [f"{file.uri} holds rows that were committed meanwhile" for file in named]
        found += _told(_rotten(store, table))
        unnamed, out_of_reach = _look_into_unnamed(store, table, family, store.handle(table))
        found += [f"{store.uri}/{table}/{path} is being written by a run, and may hold some" for path in unnamed]
        found += [f"{why}, and may hold some" for why in out_of_reach.values()]
    return found


def _told(rotten: dict[DataFile, str]) -> list[str]:
    return [
        f"{file.uri} is damaged ({why}), and may hold some; heal it: `maintain --repair`"
        for file, why in rotten.items()
    ]


def _delete(store: Store, table: str, files: dict[str, int], erased: Erased) -> None:
    removed = remove_files(f"{store.uri}/{table}", files)
    erased.files_deleted += len(removed)
    erased.bytes_deleted += sum(files[path] for path in removed)
