"""The train job: fine-tune a model on conversations and stored tokens; no video is opened.

1 plan    conversations x live videos, in batches by seed and epoch   driver, in DuckDB and Arrow
2 read    the plan's videos -> their tokens, in the plan's order      actors of Ray Data, some for each worker
3 train   a batch a step, in step with the other workers              workers of Ray Train, each a model or a shard
4 save    a checkpoint now and then; at the end the model             first worker

Without Ray one worker does 2 to 4 in the process that asks for it.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from longvlm.jobs.answer.options import fit_template
from longvlm.jobs.choose import absolute, choose_answer_model
from longvlm.jobs.cluster import logs
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.executor import InProcess, StageError
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.progress import progress
from longvlm.jobs.cluster.resources import for_train
from longvlm.jobs.limits import INTERRUPTED
from longvlm.jobs.runs import close_run
from longvlm.jobs.train.context import InProcessContext
from longvlm.jobs.train.plan import TrainPlan, plan_training, select_conversations
from longvlm.jobs.train.read import Reader, example_from_row
from longvlm.jobs.train.steps import StepsTaken
from longvlm.jobs.train.worker_config import (
    CHECKPOINTS,
    LOSSES,
    REFUSED,
    ReaderConfig,
    WorkerConfig,
    num_steps_done,
    read_losses,
)
from longvlm.pipeline.models.contract import no_projector
from longvlm.pipeline.models.families import base_for_training
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.training.card import CARD, ModelCard
from longvlm.pipeline.training.conversations import check_conversations, read_conversations
from longvlm.pipeline.training.whitening import Whitening, fit_whitening
from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import fingerprint
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.training import TrainRecipe

RUN, BASE, PLOT = "run.json", "base", "loss.png"


@dataclass(frozen=True)
class TrainOrder:
    """The order of a training run: what to train on what, and where the result goes."""

    store: str
    model: str
    to: str  # a folder that every worker can write to
    recipe: TrainRecipe
    data: str | None = None  # a file of conversations or instruction rows ...
    sql: str | None = None  # ... or a query over the store that gives the latter
    workers: int | None = None  # None: one for each GPU, or one
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class TrainReport:
    """The report of a training run: how it ended."""

    run_id: str
    folder: Path
    num_steps: int
    plan: TrainPlan
    losses: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)  # id, video, error of what could not be trained on
    wall_s: float = 0.0
    read_s: float = 0.0  # that steps waited for tokens
    step_s: float = 0.0
    stopped: str | None = None
    notes: list[str] = field(default_factory=list)  # what a person should know, and no result depends on

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm train --json` ends with."""
        return {
            "run_id": self.run_id,
            "steps": len(self.losses),
            "final_loss": self.losses[-1]["loss"] if self.losses else None,
            "videos": len(self.plan.videos),
            "conversations": self.plan.num_conversations,
            "refused": len(self.refused),
            "not_in_store": self.plan.num_missing,
            "wall_s": round(self.wall_s, 3),
            "read_s": round(self.read_s, 3),
            "step_s": round(self.step_s, 3),
            "checkpoint": None if self.stopped else str(self.folder),
            "stopped": self.stopped,
        }

    @property
    def stages(self) -> dict[str, dict[str, float]]:
        """Seconds for the table `runs`."""
        return {"read": {"busy_s": self.read_s}, "step": {"busy_s": self.step_s}}


def run_train(order: TrainOrder) -> TrainReport:
    """Train a model, or resume what was begun in the same folder with the same settings.

    Raises:
        InputError: the data, model, store, recipe or folder cannot be used; no step is taken.
    """
    started_s = time.time()
    doing("reading the store and the conversations")
    store = Store.open(order.store)
    snapshot = store.pin()
    if (order.data is None) == (order.sql is None):
        raise InputError("name conversations to train on with --data FILE or with --sql QUERY.")
    if order.data is not None:
        conversations = read_conversations(order.data)
    else:
        conversations = check_conversations(select_conversations(snapshot, order.sql or ""))
    folder = Path(order.to).expanduser().absolute()
    check_folder(folder)
    doing("reading the model")
    model = base_for_training(absolute(order.model), folder / BASE, order.recipe.seed)
    spec, stored = choose_answer_model(store, model)
    fit_template(spec, order.recipe.template)
    if not spec.has_projector and (order.recipe.stage == "projector" or order.recipe.whiten):
        raise InputError(no_projector(spec.name))
    doing("planning the steps")
    plan = plan_training(snapshot, conversations, stored.fingerprint)
    settings = {"recipe": order.recipe.fingerprint, "weights": spec.weights, "data": plan.fingerprint}
    claim_folder(folder, settings)
    report = TrainReport(new_run_id(), folder, order.recipe.num_steps(len(plan.videos)), plan)
    logs.begun("train", report.run_id, store=store.uri, model=order.model)
    if not is_finished(folder, report.num_steps):
        reader_config = ReaderConfig(
            snapshot,
            spec.sight,
            min(order.recipe.max_length, spec.context),
            order.recipe.tokens_per_segment,
        )
        _train(order, report, reader_config, model, _provenance(store, report))
    report.losses, report.refused = read_losses(folder), _read_refused(folder)
    if not report.stopped:
        plot_losses(report.losses, folder / PLOT)
    report.wall_s = time.time() - started_s
    close_run(store, "train", report)
    logs.ended("train", report.run_id, report.as_json(), report.stopped)
    return report


def _provenance(store: Store, report: TrainReport) -> dict[str, Any]:
    plan = report.plan
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items() if version >= 0)
    return {
        "store": store.uri,
        "versions_of_its_tables": versions,
        "hash_of_conversations_and_tokens": plan.fingerprint,
        "videos": len(plan.videos),
        "conversations": plan.num_conversations,
        "run": report.run_id,
    }


def check_folder(folder: Path) -> None:
    """Raise InputError where the folder of a run is something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--to {folder} is a file; name a folder for the trained model.")
    if folder.is_dir() and any(path.name != BASE for path in folder.iterdir()) and not (folder / RUN).is_file():
        raise InputError(f"--to {folder} holds something else already; name a new folder for the trained model.")


def claim_folder(folder: Path, settings: dict[str, str]) -> None:
    """Note in the folder what is trained there; raise InputError where that is another run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if path.is_file():
        held = json.loads(path.read_text())
        if other := [name for name, value in settings.items() if held.get(name) != value]:
            raise InputError(
                f"--to {folder} holds a run with another {' and another '.join(other)}; name a new folder, or use what "
                "that run was begun with."
            )
        return
    draft = folder / f".{RUN}"
    draft.write_text(json.dumps({**settings, "fingerprint": fingerprint(settings)}, indent=2) + "\n")
    draft.replace(path)


def _train(
    order: TrainOrder, report: TrainReport, reader_config: ReaderConfig, model: str, provenance: dict[str, Any]
) -> None:
    """Stages 2 to 4; what a stopped run has saved is kept, and the same command goes on from there."""
    recipe, folder = order.recipe, report.folder
    executor = open_executor(order.ray_address)
    resources = for_train(executor.resources(), order.workers)
    newest = newest_checkpoint(folder)
    first = (num_steps_done(newest) or 0) if newest else 0
    parts = [report.plan.blocks(recipe, i, resources.workers, first) for i in range(resources.workers)]
    steps_per_epoch = -(-len(report.plan.videos) // recipe.batch_videos)
    whitening = _fit_whitening(report.plan, recipe, reader_config) if recipe.whiten else None
    checkpoint = str(newest) if newest else None
    named = order.model if model == absolute(order.model) else model
    config = WorkerConfig(
        model,
        ModelCard(named, recipe, report.num_steps, 0.0, provenance),
        str(folder),
        report.num_steps,
        steps_per_epoch,
        resources.threads,
        whitening,
        checkpoint,
    )
    bars = progress(StepsTaken(folder), {"train": report.num_steps}, show=order.show_progress, units={"train": "steps"})
    try:
        with bars:
            if isinstance(executor, InProcess):
                result = _fit_in_process(config, parts, reader_config, report.run_id)
            else:
                from longvlm.jobs.train.on_ray import fit_on_ray

                result = fit_on_ray(config, parts, reader_config, resources, report.run_id)
        report.stopped = result.get("stopped")
        report.read_s, report.step_s = result.get("read_s", 0.0), result.get("step_s", 0.0)
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except StageError as error:
        report.stopped = str(error)
    if report.stopped:
        executor.release()
    _remove_stale_attempts(folder)


def _fit_in_process(
    config: WorkerConfig, parts: Sequence[list[pa.Table]], reader_config: ReaderConfig, run_id: str
) -> dict[str, Any]:
    """`fit_on_ray` without Ray."""
    from longvlm.jobs.train.loop import run_loop

    if len(parts) > 1:
        raise InputError(f"--workers {len(parts)} needs Ray; without it one trains alone.")
    (blocks,) = parts
    attempt = Path(config.folder) / CHECKPOINTS / run_id
    context = InProcessContext(blocks, reader_config, attempt, config.card.recipe.keep_checkpoints)
    try:
        return run_loop(config, context)
    except Exception as error:
        raise StageError(f"{type(error).__name__}: {error}") from error


def _fit_whitening(plan: TrainPlan, recipe: TrainRecipe, config: ReaderConfig) -> Whitening:
    """A whitening of the videos that come first, the same for every worker and every attempt."""
    reader = Reader(config)

    def prefixes() -> Iterator[Any]:
        for block in islice(plan.blocks(recipe, 0, 1, 0), 64):
            found = (example_from_row(row).prefix.rows for row in reader(block).to_pylist())
            yield from (rows for rows in found if len(rows))

    return fit_whitening(prefixes())


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of any earlier attempt that has done the most steps, and is whole."""
    done = {path: num_steps_done(path) for path in (folder / CHECKPOINTS).glob("*/checkpoint_*")}
    return max((path for path in done if done[path]), key=lambda path: done[path] or 0, default=None)


def is_finished(folder: Path, num_steps: int) -> bool:
    """Whether all steps were taken and the model was saved, of which the card is the last file."""
    newest = newest_checkpoint(folder)
    return newest is not None and num_steps_done(newest) == num_steps and (folder / CARD).is_file()


def _remove_stale_attempts(folder: Path) -> None:
    """Remove attempts of Ray Train whose checkpoints are behind the newest one."""
    newest = newest_checkpoint(folder)
    for attempt in (folder / CHECKPOINTS).glob("*"):
        if newest is not None and attempt != newest.parent:
            shutil.rmtree(attempt) if attempt.is_dir() else os.unlink(attempt)  # noqa: PTH108 - beside rmtree


def _read_refused(folder: Path) -> list[dict[str, Any]]:
    """Each refused conversation once: steps that were taken again told it again."""
    path = folder / REFUSED
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in dict.fromkeys(lines)]


def plot_losses(losses: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss curve, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # the extra `train` is not installed; the numbers are in loss.jsonl
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in losses], [line["loss"] for line in losses])
    axes.set(xlabel="step", ylabel="loss", title=f"{LOSSES} of {path.parent.name}")
    figure.savefig(path, dpi=120)
