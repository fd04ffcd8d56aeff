"""The tally of a run: what its stages have begun, finished and burnt, counted outside Ray's own retries."""

import gc
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import COLLECT_EVERY

WORKER = f"{os.uname().nodename}:{os.getpid()}"  # who reports
MAX_ATTEMPTS = 3  # a unit that was at work in three workers that died is taken to have killed them


@dataclass
class StageTally:
    """One stage's progress: units done, and the seconds its workers were busy and burnt on CPUs."""

    done: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0
    workers: set[str] = field(default_factory=set)
    started: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # begun and not finished, by key
    held_by: dict[str, str] = field(default_factory=dict)  # by key: the worker that began it last


class Tally:
    """Counts beginnings and ends of work, so that work which keeps killing its worker is found, and stages compared.

    Ray retries a dead worker's task for ever and tells nobody; a count kept outside that retry does (FACTS: "A row that
    always kills: endless retries"). Being told of all work, it is also where work is counted for the metrics.
    """

    def __init__(self, run_id: str = "") -> None:
        self.of_run = run_id
        self.stages: dict[str, StageTally] = defaultdict(StageTally)
        self.first_begin_s: float | None = None  # epoch
        self.moved_s = time.monotonic()  # when anything was begun or finished last

    def attempts(self, stage: str, keys: list[str]) -> list[int]:
        """How often each key was begun and not finished."""
        return [self.stages[stage].started.get(key, 0) for key in keys]

    def begin(self, stage: str, keys: list[str], worker: str = WORKER) -> None:
        """Work on these keys starts now."""
        self.moved_s = time.monotonic()
        self.first_begin_s = self.first_begin_s or time.time()
        for key in keys:
            self.stages[stage].started[key] += 1
            self.stages[stage].held_by[key] = worker

    def finish(self, stage: str, keys: list[str], *, worker: str, busy_s: float, cpu_s: float) -> None:
        """Work on these keys ended, well or with an error of their own."""
        tally = self.stages[stage]
        self.moved_s = time.monotonic()
        for key in keys:
            tally.started.pop(key, None)
            tally.held_by.pop(key, None)
        tally.done += len(keys)
        tally.busy_s += busy_s
        tally.cpu_s += cpu_s
        tally.workers.add(worker)
        metrics.count_work(stage, len(keys), busy_s, cpu_s)

    def add_tokens(self, phase: str, number: int, *, worker: str, busy_s: float) -> None:
        """Tokens that were prefilled or decoded, in so many wall seconds."""
        tally = self.stages[phase]
        self.moved_s = time.monotonic()
        tally.done += number
        tally.busy_s += busy_s
        tally.workers.add(worker)
        metrics.TOKENS.record(number, phase=phase)

    def stall(self) -> tuple[float, str]:
        """For how many seconds nothing was begun or finished, and in which stages and workers something is held."""
        held = [
            f"{name} in {worker} ({number})"
            for name, stage in self.stages.items()
            for worker, number in Counter(stage.held_by.values()).items()
        ]
        done = ", ".join(f"{name} {stage.done}" for name, stage in self.stages.items())
        idle = f"no worker holds anything; done so far: {done}" if done else "no stage has begun anything"
        return time.monotonic() - self.moved_s, ", ".join(held) or idle

    def run_id(self) -> str:
        """Which run this is the tally of."""
        return self.of_run

    def worker_run_id(self) -> str | None:
        """The run that stages are at work for as worker processes; None: they share this one."""
        return None

    def begun_s(self) -> float | None:
        """When the first work of all began, in seconds since the epoch; None before."""
        return self.first_begin_s

    def report(self) -> dict[str, dict[str, float]]:
        """Per stage: units done, workers seen, seconds busy, CPU seconds."""
        return {
            name: {"done": t.done, "workers": len(t.workers), "busy_s": t.busy_s, "cpu_s": t.cpu_s}
            for name, t in list(self.stages.items())  # a progress bar asks from a thread of its own
        }


class StageReporter:
    """A stage's line to the tally: how often work was begun before, and how long it took."""

    def __init__(self, name: str, tally: Any) -> None:
        self.name = name
        self.tally = tally

    def start_worker(self) -> None:
        """Let a worker process log what it does for the run and the stage, and seldom look for cycles while it loads.

        The driver's own process stays as it is.
        """
        run_id = self.tally.worker_run_id()
        if run_id is not None:
            logs.start_worker(run_id, self.name)
            gc.set_threshold(COLLECT_EVERY)

    def attempts(self, keys: list[str]) -> list[int]:
        """How often each key was begun by a worker that did not live to finish it."""
        found: list[int] = self.tally.attempts(self.name, keys)
        return found

    @contextmanager
    def work(self, keys: list[str]) -> Iterator["Clock"]:
        """Count the keys as begun, and as finished with the time the clock inside measured."""
        self.begin(keys)
        clock = Clock()
        yield clock
        self.finish(keys, clock.busy_s, clock.cpu_s)

    def begin(self, keys: list[str]) -> None:
        """Count the keys as begun; returns when that is known, for the work may kill us."""
        self.tally.begin(self.name, keys, WORKER)

    def finish(self, keys: list[str], busy_s: float, cpu_s: float) -> None:
        """Count the keys as finished, and what they took."""
        self.tally.finish(self.name, keys, worker=WORKER, busy_s=busy_s, cpu_s=cpu_s)

    def add_tokens(self, number: int, busy_s: float) -> None:
        """Count tokens, and the wall seconds spent on them."""
        self.tally.add_tokens(self.name, number, worker=WORKER, busy_s=busy_s)


class Clock:
    """Adds up the wall and CPU seconds of this process over the calls it times."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.cpu_s = 0.0

    def time(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run `call(*args)` and add what it took."""
        busy_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            return call(*args)
        finally:
            self.busy_s += time.perf_counter() - busy_s
            self.cpu_s += time.process_time() - cpu_s
