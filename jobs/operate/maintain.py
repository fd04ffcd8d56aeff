"""The maintain job: compaction, removal of dead rows and unused files, and on request verification of every byte."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from longvlm.jobs.cluster.activity import doing, make_room
from longvlm.jobs.cluster.resources import MAX_RETENTION_HOURS, MIN_RETENTION_HOURS
from longvlm.jobs.runs import close_run
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.moments import drop_moments
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.store.upkeep.compact import compact
from longvlm.pipeline.store.upkeep.dead import Dead, dead_writes
from longvlm.pipeline.store.upkeep.erase import Erased, erase, left_over
from longvlm.pipeline.store.upkeep.repair import Repaired, mend_logs, repair
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.pipeline.store.upkeep.verify import Verified, verify
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id

_VERIFICATIONS = 3  # tries, while a forget or another maintenance is at work
_CAME_OF = {  # a table that lost rows for good: what to do about it
    "videos": "the ledger lost rows: the next index run watches their videos again, and with --prune deletes again "
    "what its source has no more; forgotten videos stay forgotten",
    "answers": "answers are lost: the same questions asked again are answered again",
    "verdicts": "verdicts are lost: the same evaluation judges those answers again",
    "recipes": "recipes are lost: the next index run registers its own again, and `longvlm recipe list` says which the "
    "views show",
    "runs": "rows of past runs are lost, on which nothing depends",
}


@dataclass(frozen=True)
class MaintainOrder:
    """The order of a maintenance run."""

    store: str
    retention_hours: float = MIN_RETENTION_HOURS
    verify: bool = False
    repair: bool = False  # verify, and have what is damaged indexed again
    show_progress: bool = False


@dataclass
class MaintainReport:
    """The report of a maintenance run."""

    run_id: str = field(default_factory=new_run_id)
    erased: Erased | None = None  # what was written of forgotten videos since they were forgotten
    dead_writes: int = 0  # whose rows may be dropped
    files_fewer: dict[str, int] = field(default_factory=dict)  # by table
    swept: dict[str, int] = field(default_factory=dict)
    verified: Verified | None = None
    repaired: Repaired | None = None
    wall_s: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # it has none
    notes: list[str] = field(default_factory=list)  # what a person should know, and no result depends on

    @property
    def stopped(self) -> str | None:
        """Why the store is not well; None if it is, or was not looked at."""
        if self.erased is not None and self.erased.still_there:
            return f"of forgotten videos something is left: {self.erased.still_there[0]}"
        if self.verified is None:
            return None
        if self.repaired is not None:
            beyond = [uri for uri in self.verified.damaged_files if uri.split("/")[-2] == "_delta_log"]
            return f"{len(beyond)} damaged files of a log cannot be made again; bring them back" if beyond else None
        if not (self.verified.problems or self.verified.damaged_files):
            return None
        return (
            f"damaged files: {len(self.verified.damaged_files):,}, things wrong with live videos: "
            f"{len(self.verified.problems):,}; with --repair the next index run watches those videos again"
        )

    def as_json(self) -> dict[str, Any]:
        """The counts of the run."""
        counts: dict[str, Any] = {"dead_writes": self.dead_writes, "files_fewer": self.files_fewer, **self.swept}
        if self.erased is not None:
            counts |= {"erased_videos": self.erased.videos, "erased_rows": sum(self.erased.rows.values())}
        if self.verified is not None:
            counts |= {
                "verified_videos": self.verified.num_videos,
                "verified_files": self.verified.num_files,
                "verified_bytes": self.verified.num_bytes,
                "damaged_files": len(self.verified.damaged_files),
                "problems": len(self.verified.problems),
            }
        if self.repaired is not None:
            counts |= {"repaired": self.repaired.videos, "tombstones_restored": self.repaired.tombstones}
            counts["commits_lost"] = len(self.repaired.commits)
            counts |= {f"{table}_rows_lost": num_rows for table, num_rows in self.repaired.rows_lost.items()}
        return {**counts, "wall_s": round(self.wall_s, 3), "stopped": self.stopped, "run_id": self.run_id}


def run_maintain(order: MaintainOrder) -> MaintainReport:
    """Maintain a store and note the run in it.

    Raises:
        InputError: there is no store, or the retention is shorter than a run may take.
    """
    started = time.time()
    doing("reading the store")
    _check_retention(order.retention_hours)
    mended = mend_logs(order.store) if order.repair else {}
    store = Store.open(order.store)
    report = MaintainReport()
    if order.verify or order.repair:
        report.verified = _verified(store, show=order.show_progress)
        if order.repair:
            report.repaired = repair(store, report.verified, report.run_id, mended)
    if report.stopped is None:  # a damaged file would stop it half-way
        kept = report.verified, report.repaired, report.run_id
        report = maintain_store(store, order.retention_hours)
        report.verified, report.repaired, report.run_id = kept
        if report.repaired:
            report.notes += [_CAME_OF[table] for table in _CAME_OF if table in report.repaired.tables_hurt]
    report.wall_s = time.time() - started
    close_run(store, "maintain", report)
    return report


def maintain_store(store: Store, retention_hours: float = MIN_RETENTION_HOURS) -> MaintainReport:
    """Compact and vacuum, without a word in the table `runs`. Where nothing is to be done, nothing is written."""
    _check_retention(retention_hours)
    started = time.time()
    report = MaintainReport()
    if come_back := left_over(store, retention_hours):
        report.erased = erase(store, come_back, report.run_id)
        drop_moments(store.pin())
    doing("looking for dead rows")
    with _dead_writes(store, retention_hours) as dead:
        report.dead_writes = len(dead.write_ids)
        doing("merging small files")
        report.files_fewer = compact(store, dead)
    doing("deleting what nobody needs")
    report.swept = vacuum(store, retention_hours)
    report.wall_s = time.time() - started
    return report


@contextmanager
def _dead_writes(store: Store, retention_hours: float) -> Iterator[Dead]:
    """The writes whose rows may be dropped, and while the body runs cannot become live."""
    dead = dead_writes(store, retention_hours)
    if not dead.abandoned:
        yield dead
        return

    def find(_: Any) -> list[str]:
        nonlocal dead
        dead = dead_writes(store, retention_hours)
        return dead.abandoned

    with store.taking("videos", find):
        yield dead


def _check_retention(hours: float) -> None:
    if not MIN_RETENTION_HOURS <= hours <= MAX_RETENTION_HOURS:
        raise InputError(
            f"a retention of {hours:g} hours is not possible: under {MIN_RETENTION_HOURS:g} it could take files from "
            f"readers and runs under way, and after {MAX_RETENTION_HOURS:g} the log forgets what it dropped."
        )


def _verified(store: Store, *, show: bool) -> Verified:
    """What is wrong with a store; looked at anew where files went because another job replaced them meanwhile.

    Raises InputError where they keep going.
    """
    for _ in range(_VERIFICATIONS):
        snapshot = store.pin()
        with _bytes_read(snapshot, show=show) as add:
            verified = verify(snapshot, add)
        looked_at, named = (
            {file.uri for table in one.tables.values() for file in table.files} for one in (snapshot, store.pin())
        )
        if verified.damaged_files.keys().isdisjoint(looked_at - named):
            return verified
    raise InputError(
        f"other jobs replaced files of the store {store.uri} each of the {_VERIFICATIONS} times that it was verified; "
        "verify it when they are done."
    )


@contextmanager
def _bytes_read(snapshot: Snapshot, *, show: bool) -> Iterator[Any]:
    """A progress bar over the bytes of all tables."""
    doing("reading every byte of the tables")
    console = Console(stderr=True)
    if is_drawn := show and console.is_terminal:
        make_room()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_drawn) as bar:
        num_bytes = sum(file.size_bytes for table in snapshot.tables.values() for file in table.files)
        task = bar.add_task("verify", total=num_bytes)
        yield lambda read: bar.advance(task, read)
