"""The context of a training worker: who trains with it, its examples, and where its checkpoints go.

On Ray it is Ray Train's. Without Ray one worker trains alone, in the process that asks for it.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import torch

from longvlm.jobs.cluster.executor import Stage, run_inprocess
from longvlm.jobs.train.read import Reader
from longvlm.jobs.train.worker_config import PROGRESS, ReaderConfig


class WorkerContext(Protocol):
    """What a training worker asks for of where it runs."""

    rank: int  # among the workers; the first one writes what is kept
    size: int  # number of workers
    device: torch.device

    def examples(self) -> Iterator[pa.Table]:
        """This worker's examples (rows of EXAMPLES), in the order of their steps."""

    def restored(self) -> AbstractContextManager[Path | None]:
        """The checkpoint of an earlier attempt of the same run, if a worker of it was lost."""

    def report(self, step: int, checkpoint: Path | None) -> None:
        """Keep a copy of a checkpoint; all workers report at the same steps, and all but the first have None."""


class RayContext:
    """The context that Ray Train gives a worker."""

    def __init__(self) -> None:
        from ray import train

        ray_context = train.get_context()
        self.rank, self.size = ray_context.get_world_rank(), ray_context.get_world_size()
        self.device = train.torch.get_device()

    def examples(self) -> Iterator[pa.Table]:
        """What the readers of this worker give, read ahead."""
        from ray import train

        shard = train.get_dataset_shard(f"examples-{self.rank}")
        yield from shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)

    def restored(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint of this run that Ray Train knows of."""
        from ray import train

        newest = train.get_checkpoint()
        return nullcontext() if newest is None else newest.as_directory()

    def report(self, step: int, checkpoint: Path | None) -> None:
        """To Ray Train, which keeps the newest few."""
        from ray import train

        kept = None if checkpoint is None else train.Checkpoint.from_directory(checkpoint)
        train.report({"step": step}, checkpoint=kept)


class InProcessContext:
    """The context of a worker that trains alone in this process.

    Args:
        blocks: the plan (PLANNED rows) from the first step that is to be taken.
        config: of the reader.
        attempt: the folder of this run's checkpoints.
        num_to_keep: how many of them stay.
    """

    rank, size = 0, 1

    def __init__(self, blocks: Sequence[pa.Table], config: ReaderConfig, attempt: Path, num_to_keep: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._blocks, self._config = blocks, config
        self._attempt, self._num_to_keep = attempt, num_to_keep

    def examples(self) -> Iterator[pa.Table]:
        """Each block as it is asked for."""
        return run_inprocess(self._blocks, [Stage(Reader, (self._config,), None, 1, 1.0)])

    def restored(self) -> AbstractContextManager[Path | None]:
        """None: what ends the worker ends the run."""
        return nullcontext()

    def report(self, step: int, checkpoint: Path | None) -> None:
        """Copy the checkpoint; without the file that tells its size a copy is not whole, so that one comes last."""
        assert checkpoint is not None, "the only worker has one"
        kept = self._attempt / f"checkpoint_{step:09}"
        shutil.copytree(checkpoint, kept, ignore=shutil.ignore_patterns(PROGRESS))
        shutil.copy(checkpoint / PROGRESS, kept)
        for old in sorted(self._attempt.glob("checkpoint_*"))[: -self._num_to_keep]:
            shutil.rmtree(old)
