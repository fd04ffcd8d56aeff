"""One trial of one fault: a run that is hurt, what must hold after it, and the run that goes on from there."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from benchmarks.faults.checks import Findings, inspect
from benchmarks.faults.world import DEADLINE_S, Driver, Ended, RealWorld

_POLL_S = 0.02


class SkippedError(Exception):
    """Skipped: a fault that cannot be made here."""


class MissedError(Exception):
    """Missed: a run ended, time and again, before it was hurt."""


@dataclass
class Trial:
    """A fault trial, with a source and a store of its own, and what went wrong with them."""

    world: RealWorld
    folder: Path
    source: str = ""
    store: str = ""
    env: dict[str, str] = field(default_factory=dict)  # of drivers
    num_frames: dict[str, int] = field(default_factory=dict)  # of the good videos that the source has now
    bad: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)  # replaced since a run saw them last
    tokens: dict[str, str] = field(default_factory=dict)  # that are right, by name, as digests
    forgotten: set[str] = field(default_factory=set)  # though their files are there
    retried: set[str] = field(default_factory=set)  # codes of failures that the second pass tries again
    flags: list[str] = field(default_factory=list)  # of the second pass, beside these
    live: set[str] = field(default_factory=set)  # at the last look
    known: dict[str, str] = field(default_factory=dict)  # failed, at the last look
    lost: set[str] = field(default_factory=set)
    doubled: set[str] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)
    hung: bool = False
    second_pass_right: bool | None = None
    notes: list[str] = field(default_factory=list)
    drivers: list[Driver] = field(default_factory=list)

    @classmethod
    def of(cls, world: RealWorld, folder: Path) -> "Trial":
        """With a copy of the corpus."""
        shutil.copytree(world.corpus.folder, folder / "videos")
        trial = cls(world, folder, str(folder / "videos"), str(folder / "store"))
        trial.env = dict(world.head.env)
        trial.num_frames, trial.bad = dict(world.corpus.num_frames), set(world.corpus.bad)
        trial.tokens = dict(world.tokens)
        return trial

    @property
    def survived(self) -> bool:
        """Whether all was as it must be."""
        return not (self.broken or self.lost or self.doubled or self.hung)

    def expect(self, *, holds: bool, otherwise: str) -> None:
        """Note what is wrong unless it holds."""
        if not holds:
            self.broken.append(otherwise)

    # --- drivers ---

    def start(self, *arguments: str, env: dict[str, str] | None = None, **faults: Any) -> Driver:
        """A command on this trial's store."""
        command = [*arguments, "--store", self.store]
        self.drivers.append(Driver(self.folder, command, {**self.env, **(env or {})}, faults))
        return self.drivers[-1]

    def index(self, *flags: str, env: dict[str, str] | None = None, **faults: Any) -> Driver:
        """The index run that everything is about."""
        command = ["index", self.source, "--model", str(self.world.model), "--recipe", "tiny", "--json", *flags]
        return self.start(*command, env=env, **faults)

    def slow_s(self, total_s: float) -> float:
        """What each video must take longer, so that a run on two decoders takes `total_s` longer."""
        return 2 * total_s / len(self.world.corpus.names)

    def await_commit(self, driver: Driver, table: str, version: int = 1) -> bool:
        """Until a table has so many commits (the first made it); False if the driver ended before."""
        while driver.is_running():
            try:
                if DeltaTable(f"{self.store}/{table}").version() >= version:
                    return True
            except TableNotFoundError:
                pass  # not made yet
            time.sleep(_POLL_S)
        return False

    def start_over(self) -> None:
        """Throw away what a run did that was to be hurt and was not."""
        self.world.head.await_idle()
        shutil.rmtree(self.store, ignore_errors=True)

    # --- what must hold ---

    def look(self) -> Findings:
        """Check all that must hold at any time; what was live before still is."""
        sure = {name: number for name, number in self.num_frames.items() if name not in self.changed}
        found = inspect(self.store, sure)
        self.lost |= {*found.lost, *(self.live - {*found.live})}
        self.doubled |= {*found.doubled}
        self.broken += found.broken
        self.live, self.known = {*found.live}, found.failed
        self.expect(holds=self.live.isdisjoint(self.forgotten), otherwise="what was forgotten is live")
        other = {name for name, digest in self.tokens.items() if found.tokens.get(name, digest) != digest}
        self.expect(holds=not other, otherwise=f"other tokens than of a run without faults: {sorted(other)}")
        return found

    def check_counts(self, ended: Ended, found: Findings) -> None:
        """The counts of a run that reported: they add up, and the ledger has as many rows of it."""
        counts = ended.counts
        if counts is None or "listed" not in counts:
            return
        ways = ("indexed", "unchanged", "moved", "failed", "known_failed", "stale", "forgotten", "not_attempted")
        self.expect(holds=counts["listed"] == sum(counts[way] for way in ways), otherwise=f"counts: {counts}")
        for status in ("indexed", "failed"):
            rows = found.by_run[counts["run_id"], status]
            self.expect(holds=rows == counts[status], otherwise=f"{counts[status]} {status}, but {rows} rows")

    def go_on(self, ended: list[Ended]) -> None:
        """After the fault: what must hold, the second pass, and what must hold then."""
        self.world.head.await_idle()
        found = self.look()
        for one in ended:
            self.check_counts(one, found)
        self.second_pass()

    def second_pass(self) -> None:
        """The same run again, unharmed: it does what was left and nothing else, and then every good video is live."""
        live = self.live - self.changed
        known = {name for name, code in self.known.items() if code not in self.retried and name not in self.changed}
        names = {*self.num_frames, *self.bad}
        work = names - live - known - self.forgotten
        expected = {
            "listed": len(names),
            "unchanged": len(live & names),
            "known_failed": len(known & names),
            "indexed": len(work & {*self.num_frames}),
            "failed": len(work & self.bad),
            "forgotten": len(self.forgotten),
            "not_attempted": 0,
            "stopped": None,
        }
        flags = [flag for code in sorted(self.retried) for flag in ("--retry-failed", code)]
        ended = self.index(*flags, *self.flags).end(DEADLINE_S)
        counts = ended.counts or {}
        self.second_pass_right = ended.code == 0 and all(counts.get(way) == number for way, number in expected.items())
        if not self.second_pass_right:
            got = {way: counts.get(way) for way in expected}
            self.broken.append(f"second pass: exit {ended.code}, {got}, not {expected}: {ended.said[-300:]}")
        self.changed.clear()
        self.live &= names
        self.check_counts(ended, self.look())
        self.lost |= {*self.num_frames} - self.live - self.forgotten
        doubled_work = self.live - names
        self.expect(holds=not doubled_work, otherwise=f"live, but not in the source: {sorted(doubled_work)}")
