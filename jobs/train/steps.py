"""The steps that a training run has taken, counted by its loss curve, which its workers write to a shared folder."""

from collections.abc import Mapping
from pathlib import Path

from longvlm.jobs.train.worker_config import LOSSES


class StepsTaken:
    """A counter for bars: the lines of the loss curve in a run's folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._num_read, self._num_steps = folder / LOSSES, 0, 0

    def begun_s(self) -> float | None:
        """When a step was taken last; None before the first."""
        return self._path.stat().st_mtime if self._count() else None

    def report(self) -> Mapping[str, Mapping[str, float]]:
        """The stage `train`."""
        return {"train": {"done": self._count()}}

    def _count(self) -> int:
        if not self._path.is_file():
            return 0
        if self._path.stat().st_size < self._num_read:  # written anew by a worker that goes on from a checkpoint
            self._num_read = self._num_steps = 0
        with self._path.open("rb") as file:
            file.seek(self._num_read)
            new = file.read()
        self._num_read, self._num_steps = self._num_read + len(new), self._num_steps + new.count(b"\n")
        return self._num_steps
