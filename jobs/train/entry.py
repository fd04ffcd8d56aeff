"""The entry point of a training worker, called by Ray Train; it loads the code of language models only there."""

from typing import Any


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run stages 3 and 4 in one worker: `longvlm.jobs.train.loop.run_loop`."""
    from longvlm.jobs.train.context import RayContext
    from longvlm.jobs.train.loop import run_loop

    return run_loop(config["worker_config"], RayContext())
