"""The learn stage of training as Ray Train runs it: workers in step, a model each or a part of it."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from ray import train

from longvlm.jobs.train.read import as_lesson
from longvlm.jobs.train.worker_config import LOSSES, PROGRESS, REFUSED, STATE, Course, read_losses
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.training.card import Card
from longvlm.pipeline.training.finetune import DivergedError, Finetuner, Step
from longvlm.pipeline.training.parameters import spread
from longvlm.pipeline.training.save import save


def learn(course: Course) -> dict[str, Any]:
    """Take every step of a course; the first worker keeps the books and saves the model.

    Returns:
        What the driver reports: why it stopped (None: it did not), and the seconds spent waiting for the first tokens,
        waiting for others, and in steps.
    """
    recipe = course.card.recipe
    rank = train.get_context().get_world_rank()
    is_several = train.get_context().get_world_size() > 1
    device = train.torch.get_device()
    torch.set_num_threads(course.threads)
    model = load_model(course.card.model, "float32", device.type)
    tuner = Finetuner(model, recipe, course.num_steps, whitening=course.whitening, shard=spread if is_several else None)
    _restore(tuner, course.checkpoint)
    books = Books(Path(course.folder), tuner.num_done, rank)
    batches = _batches(rank, tuner.num_done, course.num_steps)
    spent = {"start_s": 0.0, "read_s": 0.0, "step_s": 0.0}
    while tuner.num_done < course.num_steps:
        began_s = time.perf_counter()
        rows = next(batches)
        read_s = time.perf_counter() - began_s
        try:
            step = tuner.step([as_lesson(row) for row in rows])
        except DivergedError as error:
            return {"stopped": str(error), **spent}
        waited = "start_s" if spent["step_s"] == 0 else "read_s"  # before the first step the readers are started
        spent |= {waited: spent[waited] + read_s, "step_s": spent["step_s"] + step.step_s}
        books.note(step, read_s, rows if step.step <= course.steps_per_epoch else [])
        if step.step % recipe.save_every_steps == 0 or step.step == course.num_steps:
            _checkpoint(tuner, rank)
    learnt = tuner.trainee.learnt()
    if rank == 0:
        save(learnt, Card(**{**vars(course.card), "final_loss": books.last_loss}), Path(course.folder))
    return {"stopped": None, **spent}


def _batches(rank: int, first: int, num_steps: int) -> Iterator[list[dict[str, Any]]]:
    """This worker's rows of READ for each step from `first` on; in some it may have none."""
    shard = train.get_dataset_shard(f"lessons-{rank}")
    blocks = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
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


class Books:
    """The loss curve and the list of what could not be learnt from, as JSON lines in the run's folder."""

    def __init__(self, folder: Path, num_done: int, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.last_loss = float("nan")
        if rank == 0:
            losses = read_losses(folder)[:num_done]
            draft = folder / f".{LOSSES}"
            draft.write_text("".join(json.dumps(line) + "\n" for line in losses))
            draft.replace(folder / LOSSES)
            self.last_loss = losses[-1]["loss"] if losses else self.last_loss

    def note(self, step: Step, read_s: float, rows: list[dict[str, Any]]) -> None:
        """A line for the step; in the first epoch also one for each conversation that was refused."""
        self.last_loss = step.loss
        if self.rank == 0:
            line = {name: value for name, value in asdict(step).items() if name != "refused"}
            line |= {"read_s": round(read_s, 4), "step_s": round(step.step_s, 4), "refused": len(step.refused)}
            self._append(LOSSES, [line])
        self._append(REFUSED, [*_unread(rows), *_refused(rows, step)])

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if lines:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))


def _unread(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["error"] is not None:
            for name, *_ in json.loads(row["conversations"]):
                yield {"id": name, "video": row["uri"], "error": row["error"]}


def _refused(rows: list[dict[str, Any]], step: Step) -> Iterator[dict[str, Any]]:
    for number, place, reason in step.refused if rows else ():
        name = json.loads(rows[number]["conversations"])[place][0]
        yield {"id": name, "video": rows[number]["uri"], "error": reason}


def _checkpoint(tuner: Finetuner, rank: int) -> None:
    """Hand the state to Ray Train, which keeps the newest few. All workers report, the first one alone has a file."""
    state = tuner.state()
    metrics = {"step": tuner.num_done}
    if rank:
        train.report(metrics, checkpoint=None)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / STATE)
        size = os.path.getsize(Path(folder) / STATE)  # noqa: PTH202 - one call
        (Path(folder) / PROGRESS).write_text(json.dumps({"num_done": tuner.num_done, "size_bytes": size}))
        train.report(metrics, checkpoint=train.Checkpoint.from_directory(folder))


def _restore(tuner: Finetuner, given: str | None) -> None:
    """Go on from the newest checkpoint: of this run, if a worker of it was lost, or else what the driver found."""
    own = train.get_checkpoint()
    if own is not None:
        with own.as_directory() as folder:
            tuner.restore(torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True))
    elif given is not None:
        tuner.restore(torch.load(Path(given) / STATE, map_location="cpu", weights_only=True))
