"""The training loop of one worker: all workers in step, a model each or a shard of it."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from longvlm.jobs.train.context import WorkerContext
from longvlm.jobs.train.read import example_from_row
from longvlm.jobs.train.worker_config import LOSSES, PROGRESS, REFUSED, STATE, WorkerConfig, read_losses
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.training.finetune import DivergedError, Finetuner, StepResult
from longvlm.pipeline.training.parameters import apply_fsdp
from longvlm.pipeline.training.save import save_model


def run_loop(config: WorkerConfig, context: WorkerContext) -> dict[str, Any]:
    """Take every step of a run; the first worker writes the loss curve and saves the model.

    Returns:
        What the driver reports: why it stopped (None: it did not), and the seconds spent waiting for the first tokens,
        waiting for others, and in steps.
    """
    recipe = config.card.recipe
    torch.set_num_threads(config.threads)
    model = load_model(config.model, "float32", context.device.type)
    shard = apply_fsdp if context.size > 1 else None
    finetuner = Finetuner(model, recipe, config.num_steps, whitening=config.whitening, shard=shard)
    _restore(finetuner, config.checkpoint, context)
    run_log = RunLog(Path(config.folder), finetuner.num_done, context.rank)
    batches = _batches(context.examples(), finetuner.num_done, config.num_steps)
    seconds = {"start_s": 0.0, "read_s": 0.0, "step_s": 0.0}
    while finetuner.num_done < config.num_steps:
        started_s = time.perf_counter()
        rows = next(batches)
        read_s = time.perf_counter() - started_s
        try:
            result = finetuner.step([example_from_row(row) for row in rows])
        except DivergedError as error:
            return {"stopped": str(error), **seconds}
        waited = "start_s" if seconds["step_s"] == 0 else "read_s"  # before the first step the readers are started
        seconds |= {waited: seconds[waited] + read_s, "step_s": seconds["step_s"] + result.step_s}
        run_log.record(result, read_s, rows if result.step <= config.steps_per_epoch else [])
        if result.step % recipe.save_every_steps == 0 or result.step == config.num_steps:
            _save_state(finetuner, context)
    weights = finetuner.trainable.trained_weights()
    if context.rank == 0:
        card = replace(config.card, final_loss=run_log.last_loss)
        save_model(weights, config.model, card, Path(config.folder))
    return {"stopped": None, **seconds}


def _batches(blocks: Iterator[pa.Table], first: int, num_steps: int) -> Iterator[list[dict[str, Any]]]:
    """This worker's rows of EXAMPLES for each step from `first` on; in some it may have none."""
    rows = (row for block in blocks for row in block.to_pylist())
    expected = first
    for step, members in groupby(rows, key=lambda row: row["step"]):
        while expected < step:
            yield []
            expected += 1
        if step == expected:  # what a retried worker did before is read once more, and left out
            yield list(members)
            expected += 1
    while expected < num_steps:
        yield []
        expected += 1


class RunLog:
    """The log of a training run: the loss curve and the refused conversations, as JSON lines in the run's folder."""

    def __init__(self, folder: Path, num_done: int, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.last_loss = float("nan")
        if rank == 0:
            losses = read_losses(folder)[:num_done]
            draft = folder / f".{LOSSES}"
            draft.write_text("".join(json.dumps(line) + "\n" for line in losses))
            draft.replace(folder / LOSSES)
            self.last_loss = losses[-1]["loss"] if losses else self.last_loss

    def record(self, result: StepResult, read_s: float, rows: list[dict[str, Any]]) -> None:
        """Write a line for the step; in the first epoch also one for each conversation that was refused."""
        self.last_loss = result.loss
        if self.rank == 0:
            line = {name: value for name, value in asdict(result).items() if name != "refused"}
            line |= {"read_s": round(read_s, 4), "step_s": round(result.step_s, 4), "refused": len(result.refused)}
            self._append(LOSSES, [line])
        self._append(REFUSED, [*_unread(rows), *_refused(rows, result)])

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if lines:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def _unread(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["error"] is not None:
            for name, *_ in json.loads(row["conversations"]):
                yield {"id": name, "video": row["uri"], "error": row["error"]}


def _refused(rows: list[dict[str, Any]], result: StepResult) -> Iterator[dict[str, Any]]:
    for number, place, reason in result.refused if rows else ():
        name = json.loads(rows[number]["conversations"])[place][0]
        yield {"id": name, "video": rows[number]["uri"], "error": reason}


def _save_state(finetuner: Finetuner, context: WorkerContext) -> None:
    """Report a checkpoint. All workers report, the first alone has files."""
    state = finetuner.state_dict()
    if context.rank:
        context.report(finetuner.num_done, None)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"  # its mode is copied along, and the temporary folder's is for one user
        folder.mkdir()
        torch.save(state, folder / STATE)
        size = os.path.getsize(folder / STATE)  # noqa: PTH202 - one call
        (folder / PROGRESS).write_text(json.dumps({"num_done": finetuner.num_done, "size_bytes": size}))
        context.report(finetuner.num_done, folder)


def _restore(finetuner: Finetuner, given: str | None, context: WorkerContext) -> None:
    """Resume from the newest checkpoint: of this run, if a worker of it was lost, or else what the driver found."""
    with context.restored() as own:
        newest = own or given
        if newest is not None:
            finetuner.load_state_dict(torch.load(Path(newest) / STATE, map_location="cpu", weights_only=True))
