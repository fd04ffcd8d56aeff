"""The entry point of a training worker, called by Ray Train; it loads the code of language models only there."""

import gc
from typing import Any

from longvlm.jobs.cluster.resources import COLLECT_EVERY


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run stages 3 and 4 in one worker: `longvlm.jobs.train.loop.run_loop`."""
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])
    from longvlm.jobs.train.context import RayContext
    from longvlm.jobs.train.loop import run_loop

    return run_loop(config["worker_config"], RayContext())
