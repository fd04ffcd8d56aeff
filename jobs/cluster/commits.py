"""What a run has finished and not committed yet, and when that goes into the store."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import COMMIT_EVERY_S
from longvlm.jobs.cluster.retry import persist

T = TypeVar("T")


class Commits(Generic[T]):
    """Gathers what a run finishes and commits it after so many seconds, at so many rows, and at the end.

    Args:
        store_uri: where it goes; a store that is out of reach for a while is waited for.
        job: its name in metrics and logs.
        run_id: of the run.
        commit: puts some parts into the store; it may be called twice with the same ones.
        every_s: what a crash may cost.
        most_rows: what is kept in memory at most; None: no limit.
    """

    def __init__(
        self,
        store_uri: str,
        job: str,
        run_id: str,
        commit: Callable[[list[T]], None],
        *,
        every_s: float | None = None,
        most_rows: int | None = None,
    ) -> None:
        self._store_uri, self._job, self._run_id, self._commit = store_uri, job, run_id, commit
        self._every_s, self._most_rows = COMMIT_EVERY_S if every_s is None else every_s, most_rows
        self._parts: list[T] = []
        self.num_rows = 0  # not committed yet
        self.last_s = time.time()  # when the newest commit was done, or the run begun, in seconds since the epoch

    def add(self, part: T, num_rows: int) -> list[T]:
        """Take in a part of so many rows. Returns the parts that are committed by now and were not before."""
        self._parts.append(part)
        self.num_rows += num_rows
        is_full = self._most_rows is not None and self.num_rows >= self._most_rows
        return self.flush() if is_full or time.time() - self.last_s > self._every_s else []

    def flush(self) -> list[T]:
        """Commit what there is, and return it."""
        parts, num_rows = self._parts, self.num_rows
        if parts:
            with metrics.timed_commit(self._job):
                persist(self._store_uri, self._commit, parts)
            logs.committed(self._job, self._run_id, num_rows)
            self.last_s = time.time()
        self._parts, self.num_rows = [], 0
        return parts
