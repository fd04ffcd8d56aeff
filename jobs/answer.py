"""The answer job: questions and live tokens to answers; no video is opened.

1 plan     questions x live videos, less what is answered already   driver, in DuckDB
2 answer   a block of videos with their questions -> answers        actors with the language model
3 account  a row a question and video                               driver
4 commit   every two minutes and at the end                         driver
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from jobs.answering import GROUPS, Answerer, failed_answer
from jobs.asking import plan
from jobs.models import choose_answer_model
from jobs.report import progress, record_run
from jobs.resources import COMMIT_EVERY_S, MAX_PASSES, for_answer
from jobs.session import connect, failure_of, release_failed_execution
from jobs.tally import start_tally
from pipeline.language.questions import Question
from pipeline.store import catalog
from pipeline.store.ledger import Store
from pipeline.store.snapshot import Snapshot
from pipeline.store.upkeep import merge_small_files
from schemas import tables
from schemas.errors import ErrorCode, TerminalError
from schemas.identity import new_run_id
from schemas.recipe import AnswerRecipe, Precision


@dataclass(frozen=True)
class AnswerOrder:
    """What to ask, of which videos."""

    store: str
    questions: list[Question]
    model: str | None = None
    where: str | None = None  # an SQL predicate over the view `videos`
    precision: Precision = "bfloat16"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class AnswerReport:
    """How a run ended; `rows` holds every answer that was asked for, old and new, as rows of tables.ANSWERS."""

    run_id: str
    asked: int
    reused: int  # answers that were in the store already
    videos_without_recipe: int
    rows: list[dict[str, Any]]
    wall_s: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm answer --json` ends with."""
        answered = sum(row["status"] == "answered" for row in self.rows)
        return {
            "asked": self.asked,
            "answered": answered,
            "failed": len(self.rows) - answered,
            "reused": self.reused,
            "not_attempted": self.asked - len(self.rows),
            "videos_without_recipe": self.videos_without_recipe,
            "wall_s": round(self.wall_s, 3),
            "run_id": self.run_id,
        }


def run_answer(order: AnswerOrder) -> AnswerReport:
    """Answer questions about the live videos of a store.

    Raises:
        InputError: the store, model, predicate or a question's video cannot be used; nothing is written.
    """
    started = time.perf_counter()
    store = Store.open(order.store)
    spec, stored = choose_answer_model(store, order.model)
    recipe = AnswerRecipe(
        model=spec.name,
        weights=spec.weights,
        index_recipe=stored.recipe.fingerprint,
        precision=order.precision,
        max_new_tokens=order.max_new_tokens,
        temperature=order.temperature,
        top_p=order.top_p,
        seed=order.seed,
    )
    snapshot = store.pin()
    asking = plan(catalog.connect(snapshot), order.questions, order.where, recipe)
    report = AnswerReport(
        new_run_id(), asking.asked, len(asking.reused), asking.videos_without_recipe, rows=list(asking.reused)
    )
    if asking.groups:
        connect(order.ray_address)
        _answer_groups(asking.groups, recipe, snapshot, Commits(store, report), show=order.show_progress)
    report.wall_s = time.perf_counter() - started
    if asking.groups:
        record_run(store, "answer", report.as_json(), report.stages)
        merge_small_files(store)
        catalog.write_index_duckdb(store.uri, store.pin())
    return report


def _answer_groups(
    groups: list[dict[str, Any]], recipe: AnswerRecipe, snapshot: Snapshot, commits: "Commits", *, show: bool
) -> None:
    """Stages 2 to 4; questions whose answers are lost with a worker are asked again, then fail as lost."""
    report = commits.report
    tally = start_tally(report.run_id)
    waiting = {(group["write_id"], q["question_id"]): (group, q) for group in groups for q in group["questions"]}
    try:
        with progress(tally, {"answer": len(waiting)}, show=show):
            for _ in range(MAX_PASSES):
                for answers in _stage(groups, recipe, snapshot, report.run_id, tally):
                    keys = zip(answers["write_id"].to_pylist(), answers["question_id"].to_pylist(), strict=True)
                    commits.add(answers.filter(pa.array([waiting.pop(key, None) is not None for key in keys])))
                if not waiting:
                    break
                groups = [{**group, "questions": [question]} for group, question in waiting.values()]
        lost = TerminalError(ErrorCode.LOST, f"lost {MAX_PASSES} times with the workers that held it; ask again.")
        rows = [failed_answer(group, question, recipe, report.run_id, lost) for group, question in waiting.values()]
        commits.add(pa.Table.from_pylist(rows, schema=tables.ANSWERS))
    except KeyboardInterrupt:
        report.stopped = "interrupted"
    except ray.exceptions.RayError as error:
        report.stopped = failure_of(error)
    finally:
        commits.flush()
    if report.stopped:
        release_failed_execution()  # not in the except clause, where the exception is still held
    report.stages = ray.get(tally.report.remote())


def _stage(
    groups: list[dict[str, Any]], recipe: AnswerRecipe, snapshot: Snapshot, run_id: str, tally: Any
) -> Iterator[pa.Table]:
    """The stage on Ray Data: rows of GROUPS in, batches of tables.ANSWERS out as they land."""
    resources = for_answer(ray.cluster_resources(), len(groups))
    table = pa.Table.from_pylist(groups, schema=GROUPS)
    size = resources.videos_per_block
    answers = ray.data.from_blocks([table.slice(i, size) for i in range(0, len(table), size)]).map_batches(
        Answerer,
        fn_constructor_args=(asdict(recipe), snapshot, run_id, tally, resources),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=resources.answerers),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    return answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


class Commits:
    """Gathers answers and appends them to the store every two minutes and at the end."""

    def __init__(self, store: Store, report: AnswerReport) -> None:
        self.store = store
        self.report = report
        self.unsaved: list[pa.Table] = []
        self.last = time.monotonic()

    def add(self, answers: pa.Table) -> None:
        """Take in rows of tables.ANSWERS."""
        self.unsaved.append(answers)
        if time.monotonic() - self.last > COMMIT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Append what there is; only then is it an answer of the report."""
        answers = pa.concat_tables([tables.ANSWERS.empty_table(), *self.unsaved])
        if len(answers):
            self.store.append("answers", answers)
            self.report.rows += answers.to_pylist()
        self.unsaved.clear()
        self.last = time.monotonic()


if __name__ == "__main__":
    import sys

    from jobs.cli import main

    main(["answer", *sys.argv[1:]])
