"""The train stage as Ray runs it: readers turn the plan into tokens, workers of Ray Train learn from them in step."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from ray import train

from jobs.terms import ROOM_FOR_QUESTION
from pipeline.language.families import load_model
from pipeline.language.finetune import DivergedError, Finetuner, Step
from pipeline.language.markers import timeline_of
from pipeline.language.model import Timeline
from pipeline.language.packing import Caption, Lesson
from pipeline.language.sharding import spread
from pipeline.language.trained import Card, save
from pipeline.language.whitening import Whitening
from pipeline.store.shards import by_video, read_segments, read_tokens
from pipeline.store.snapshot import Snapshot
from pipeline.vision.budget import fit
from pipeline.vision.tokens import from_arrow
from schemas import tables
from schemas.errors import PipelineError
from schemas.recipe import AnswerRecipe

STATE, PROGRESS = "state.pt", "progress.json"
LOSSES, REFUSED = "loss.jsonl", "refused.jsonl"

_YIELD = 19  # a reader runs far ahead, and must not take the cores from those who learn
READ = pa.schema(  # a lesson on its way to a worker
    [
        ("step", pa.int64()),
        ("uri", pa.string()),
        ("conversations", pa.string()),  # JSON: [id, [[question, answer], ...], at_s] each
        ("prefix", pa.large_binary()),  # [N, dim]
        ("dim", pa.int32()),
        ("dtype", pa.string()),
        ("num_whole_frames", pa.int32()),
        ("num_global", pa.int32()),
        ("counts", pa.list_(pa.int32())),
        ("starts_s", pa.list_(pa.float64())),
        ("error", pa.string()),  # why there are no tokens; null where there are
    ]
)


@dataclass(frozen=True)
class Reading:
    """What a reader has to know besides the plan."""

    snapshot: Snapshot
    num_global: int  # rows that the model's projector reads ahead of the local ones
    longest: int  # tokens of a sequence
    tokens_per_segment: int | None
    num_beside: int  # rows that time markers may take beside a segment's

    @property
    def budget(self) -> AnswerRecipe:
        """How a video is merged on: as answering does where a context could not hold it, evenly."""
        room = self.longest - 2 * ROOM_FOR_QUESTION
        return AnswerRecipe(
            "", "", "", budget=room if room > self.num_global + self.num_beside else None,
            tokens_per_segment=self.tokens_per_segment, focus="even",
        )  # fmt: skip


class Reader:
    """Plan rows (LESSONS) in, their tokens (READ) out, in the same order."""

    def __init__(self, reading: Reading) -> None:
        torch.set_num_threads(1)
        os.nice(_YIELD)
        self.reading = reading

    def __call__(self, plan: pa.Table) -> pa.Table:
        """One block of the plan."""
        rows = plan.to_pylist()
        write_ids = sorted({row["write_id"] for row in rows})
        try:
            tokens, segments = self._read(write_ids)
        except (PipelineError, OSError) as error:
            made = [_lesson_row(row) | {"error": str(error)} for row in rows]
        else:
            made = [self._row(row, tokens.get(row["write_id"]), segments.get(row["write_id"])) for row in rows]
        return pa.Table.from_pylist(made, READ)

    def _read(self, write_ids: list[str]) -> tuple[dict[str, pa.Table], dict[str, pa.Table]]:
        snapshot = self.reading.snapshot
        if not write_ids:
            return {}, {}
        return by_video(read_tokens(snapshot, write_ids)), by_video(read_segments(snapshot, write_ids))

    def _row(self, row: dict[str, Any], tokens: pa.Table | None, segments: pa.Table | None) -> dict[str, Any]:
        reading = self.reading
        try:
            video = from_arrow(tables.TOKENS.empty_table() if tokens is None else tokens)
            video = fit(video, reading.budget, num_global=reading.num_global, num_beside=reading.num_beside)
        except PipelineError as error:
            return _lesson_row(row) | {"error": str(error)}
        if segments is None:
            return _lesson_row(row) | {"error": "the video's segments are gone; index it again."}
        prefix = video.prefix(with_global=reading.num_global > 0)
        timeline = timeline_of(video, segments.to_pylist(), reading.num_global)
        return _lesson_row(row) | {
            "prefix": prefix.numpy().tobytes(),
            "dim": video.dim,
            "dtype": str(prefix.dtype).removeprefix("torch."),
            "num_whole_frames": None if reading.num_global else video.num_whole_frames,
            "num_global": timeline.num_global,
            "counts": list(timeline.counts),
            "starts_s": list(timeline.starts_s),
        }


def _lesson_row(row: dict[str, Any]) -> dict[str, Any]:
    talks = [
        [one["id"], [[turn["question"], turn["answer"]] for turn in one["turns"]], one["at_s"]]
        for one in row["conversations"]
    ]
    return {"step": row["step"], "uri": row["uri"], "conversations": json.dumps(talks)}


def as_lesson(row: dict[str, Any]) -> Lesson:
    """A row of READ as the finetuner takes it; without tokens it has no conversations."""
    if row["error"] is not None:
        return Lesson(torch.empty(0, 1), [])
    talks = [
        tuple((question, answer) for question, answer in turns) if at_s is None else Caption(at_s, turns[0][1])
        for _, turns, at_s in json.loads(row["conversations"])
    ]
    prefix = torch.frombuffer(bytearray(row["prefix"]), dtype=getattr(torch, row["dtype"])).view(-1, row["dim"])
    timeline = Timeline(row["num_global"], tuple(row["counts"]), tuple(row["starts_s"]))
    return Lesson(prefix, talks, row["num_whole_frames"], timeline)


@dataclass(frozen=True)
class Course:
    """What every worker of a run is told."""

    card: Card
    folder: str  # where the model, its losses and what was refused go
    num_steps: int
    steps_per_epoch: int
    threads: int
    whitening: Whitening | None
    checkpoint: str | None  # to go on from


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Take every step of a course; the first worker keeps the books and saves the model.

    Returns:
        What the driver reports: why it stopped (None: it did not), and the seconds spent waiting for the first tokens,
        waiting for others, and in steps.
    """
    course: Course = config["course"]
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


def read_losses(folder: Path) -> list[dict[str, Any]]:
    """The loss curve so far; a last line that a killed run left unfinished is left out."""
    path = folder / LOSSES
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


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


def progress_of(checkpoint: Path) -> int | None:
    """How many steps a checkpoint has done; None where it is not whole."""
    try:
        told = json.loads((checkpoint / PROGRESS).read_text())
        is_whole = (checkpoint / STATE).stat().st_size == told["size_bytes"]
    except (OSError, ValueError):
        return None
    return int(told["num_done"]) if is_whole else None
