"""What Ray Train calls in each worker; it loads the code of language models only there."""

from typing import Any


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Stage 3 and 4 in one worker: `longvlm.jobs.train.learn.learn`."""
    from longvlm.jobs.train.learn import learn

    return learn(config["course"])
