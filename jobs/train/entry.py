"""The entry points of training workers and readers, called by Ray; PyTorch and models' code are loaded only there.

Ray's own processes, which start and watch these, load this module too.
"""

import gc
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from longvlm.jobs.cluster.resources import COLLECT_EVERY

if TYPE_CHECKING:
    from longvlm.jobs.train.worker_config import ReaderConfig


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run stages 3 and 4 in one worker: `longvlm.jobs.train.loop.run_loop`."""
    gc.set_threshold(COLLECT_EVERY)
    from longvlm.jobs.train.context import RayContext
    from longvlm.jobs.train.loop import run_loop

    return run_loop(config["worker_config"], RayContext())


class ReadWorker:
    """Run stage 2 beside those who train: `longvlm.jobs.train.read.Reader`, at the lowest priority."""

    def __init__(self, config: "ReaderConfig") -> None:
        gc.set_threshold(COLLECT_EVERY)
        from longvlm.jobs.train.read import Reader

        self.read = Reader(config, low_priority=True)

    def __call__(self, plan: pa.Table) -> pa.Table:
        """Rows of PLANNED in, EXAMPLES out."""
        return self.read(plan)
