"""The configuration of training workers and readers, and the files of a run, which the driver and its workers share.

Ray Train's own processes load this module too, so that a language model's code is loaded where one is trained only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.training.card import ModelCard

if TYPE_CHECKING:
    from longvlm.pipeline.training.whitening import Whitening

STATE, PROGRESS = "state.pt", "progress.json"
LOSSES, REFUSED, CHECKPOINTS = "loss.jsonl", "refused.jsonl", "checkpoints"


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a run's workers, the same for all."""

    model: str  # to train, by a name that holds in every process; the card has the user's
    card: ModelCard
    folder: str  # where the model, its losses and what was refused go
    num_steps: int
    steps_per_epoch: int
    threads: int
    whitening: "Whitening | None"
    checkpoint: str | None  # to resume from


@dataclass(frozen=True)
class ReaderConfig:
    """The configuration of a reader: all that it has to know besides the plan."""

    snapshot: Snapshot
    sight: Sight  # of the model
    longest: int  # tokens of a sequence
    tokens_per_segment: int | None


def read_losses(folder: Path) -> list[dict[str, Any]]:
    """The loss curve so far; a last line that a killed run left unfinished is left out."""
    path = folder / LOSSES
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def num_steps_done(checkpoint: Path) -> int | None:
    """The number of steps that a checkpoint has done; None where it is not whole."""
    try:
        told = json.loads((checkpoint / PROGRESS).read_text())
        is_whole = (checkpoint / STATE).stat().st_size == told["size_bytes"]
    except (OSError, ValueError):
        return None
    return int(told["num_done"]) if is_whole else None
