"""The answer job: questions and live tokens to answers; no video is opened.

1 plan     questions x live videos, less what is answered already   driver, in DuckDB
2 answer   a block of videos with their questions -> answers        actors with the language model
3 account  a row a question and video                               driver, wave by wave
4 commit   every two minutes, every 20,000 answers and at the end   driver
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy

from longvlm.jobs.answer.estimate import estimate
from longvlm.jobs.answer.options import fit_budget, fit_focus, fit_template
from longvlm.jobs.answer.plan import Asking, plan
from longvlm.jobs.answer.stage import Answerer, AnswerTerms, failed_answer
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.progress import progress
from longvlm.jobs.cluster.resources import COMMIT_ANSWERS, COMMIT_EVERY_S, MAX_PASSES, AnswerResources, for_answer
from longvlm.jobs.cluster.retry import persist
from longvlm.jobs.cluster.session import INTERRUPTED, connect, failure_of, release_failed_execution
from longvlm.jobs.cluster.tally import start_tally
from longvlm.jobs.index.limits import OutOfTimeError
from longvlm.jobs.runs import record_run, refresh_index
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.recipe import AnswerRecipe, Focus, Precision

_UNITS = {"answer": "questions", "prefill": "tokens", "decode": "tokens"}  # the stages as the tally counts them


@dataclass(frozen=True, eq=False)
class AnswerOrder:
    """What to ask, of which videos, and how."""

    store: str
    questions: pa.Table  # tables.QUESTIONS
    model: str | None = None
    where: str | None = None  # an SQL predicate over the view `videos`
    limit: int | None = None  # at most this many videos
    template: str | None = None  # None: the model's own
    budget: int | None = None  # visual tokens; None: what is stored, or what the model's context holds
    tokens_per_segment: int | None = None
    focus: Focus | None = None
    precision: Precision = "bfloat16"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    kv_gb: float | None = None  # memory of the KV cache; None: what the device has to spare
    dry_run: bool = False  # plan and estimate only
    max_hours: float | None = None  # then the run ends, well
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class AnswerReport:
    """How a run ended."""

    run_id: str
    store: Store
    asking: Asking
    given: Counter[str] = field(default_factory=Counter)  # new answers by status
    wall_s: float = 0.0
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    stopped: str | None = None
    out_of_time: bool = False  # it ended at max_hours
    estimate: dict[str, Any] | None = None  # of a dry run
    notes: list[str] = field(default_factory=list)  # what a person should know, and no answer depends on

    def rows(self, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows of tables.ANSWERS for what was asked, old and new, read from the store."""
        return islice(self.asking.answers(self.store.pin(), self.run_id), limit)

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm answer --json` ends with."""
        by_status = self.given + Counter(self.asking.reused)
        counts = {
            "videos": self.asking.num_videos,
            "asked": self.asking.num_asked,
            **{status: by_status[status] for status in ("answered", "unparsed", "failed")},
            "reused": sum(self.asking.reused.values()),
            "not_attempted": self.asking.num_pending - self.given.total(),
            "not_indexed": self.asking.num_not_indexed,
            "videos_without_recipe": self.asking.num_without_recipe,
        }
        if self.estimate is not None:
            return {**counts, **self.estimate}
        said = {"wall_s": round(self.wall_s, 3), "stopped": self.stopped, "run_id": self.run_id}
        return {**counts, **_measured(self.stages), **said}


def _measured(stages: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the next dry run estimates from: questions and tokens, and the seconds that all workers spent on them."""
    if "answer" not in stages:
        return {}
    found = {"questions": stages["answer"]["done"], "workers": stages["answer"]["workers"]}
    for name in ("prefill", "decode"):
        stage = stages.get(name, {"done": 0, "busy_s": 0.0})
        found |= {f"{name}_tokens": stage["done"], f"{name}_s": round(stage["busy_s"], 3)}
    return found


def run_answer(order: AnswerOrder) -> AnswerReport:
    """Answer questions, note the run in the store, and leave few files behind. Raises as `answer_questions`."""
    report = answer_questions(order)
    if report.asking.num_pending and not order.dry_run:
        record_run(report.store, "answer", report.as_json(), report.stages)
        merge_small_files(report.store)
        refresh_index(report.store, report.notes)
    return report


def answer_questions(order: AnswerOrder) -> AnswerReport:
    """Stages 1 to 4, about the live videos of a store.

    Raises:
        InputError: the store, model, predicate, a question's video or the budget cannot be used; nothing is written.
    """
    started_s = time.time()
    store = Store.open(order.store)
    spec, stored = choose_answer_model(store, order.model)
    recipe = AnswerRecipe(
        model=spec.name,
        weights=spec.weights,
        index_recipe=stored.recipe.fingerprint,
        template=fit_template(spec, order.template),
        precision=order.precision,
        budget=fit_budget(spec, order.budget, order.max_new_tokens),
        tokens_per_segment=order.tokens_per_segment,
        focus=fit_focus(stored, order.focus, order.budget),
        max_new_tokens=order.max_new_tokens,
        temperature=order.temperature,
        top_p=order.top_p,
        seed=order.seed,
    )
    snapshot = store.pin()
    report = AnswerReport(new_run_id(), store, plan(snapshot, order.questions, recipe, order.where, order.limit))
    if order.dry_run:
        report.estimate = estimate(report.asking, recipe, stored.recipe, spec.sight.num_global_tokens, snapshot)
    elif report.asking.num_pending:
        connect(order.ray_address)
        terms = AnswerTerms(recipe, spec.sight, snapshot, report.run_id, search_model=stored.recipe.tower.name)
        resources = for_answer(ray.cluster_resources(), report.asking.num_pending, order.kv_gb)
        logs.begun("answer", report.run_id, store=store.uri, model=recipe.model)
        end_s = None if order.max_hours is None else started_s + order.max_hours * 3600
        _answer_waves(terms, resources, Commits(store, report, end_s), show=order.show_progress)
        logs.ended("answer", report.run_id, report.as_json(), report.stopped)
    report.wall_s = time.time() - started_s
    return report


class Commits:
    """Gathers answers and appends them to the store now and then, and at the end."""

    def __init__(self, store: Store, report: AnswerReport, end_s: float | None = None) -> None:
        self.store = store
        self.report = report
        self.end_s = end_s  # when the time of the run is over, in seconds since the epoch
        self.unsaved: list[pa.Table] = []
        self.last = time.monotonic()

    def add(self, answers: pa.Table) -> None:
        """Take in rows of tables.ANSWERS. Raises OutOfTimeError when that was all there is time for."""
        self.unsaved.append(answers)
        num_unsaved = sum(map(len, self.unsaved))
        metrics.QUEUE.record(self.report.asking.num_pending - self.report.given.total() - num_unsaved, job="answer")
        if time.monotonic() - self.last > COMMIT_EVERY_S or num_unsaved >= COMMIT_ANSWERS:
            self.flush()
        if self.end_s is not None and time.time() > self.end_s:
            raise OutOfTimeError

    def flush(self) -> None:
        """Append what there is; only then does the report count it."""
        answers = pa.concat_tables([tables.ANSWERS.empty_table(), *self.unsaved])
        if len(answers):
            with metrics.timed_commit("answer"):
                persist(self.store.uri, self.store.append, "answers", answers)
            logs.committed("answer", self.report.run_id, len(answers))
            self.report.given.update(answers["status"].to_pylist())
        self.unsaved.clear()
        self.last = time.monotonic()


def _answer_waves(terms: AnswerTerms, resources: AnswerResources, commits: Commits, *, show: bool) -> None:
    """Stages 2 to 4, wave by wave; what is answered when a run is stopped is kept."""
    report = commits.report
    tally = start_tally(report.run_id)
    expected = {"answer": report.asking.num_pending, "prefill": None, "decode": None}
    try:
        with progress(tally, expected, show=show, units=_UNITS):
            for wave in report.asking.waves(resources.questions_per_block):
                _answer_wave(wave, terms, resources, commits, tally)
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except OutOfTimeError:
        report.out_of_time = True
    except ray.exceptions.RayError as error:
        report.stopped = failure_of(error)
    finally:
        commits.flush()
        metrics.QUEUE.record(0, job="answer")  # nothing waits any more, whatever is left
    if report.stopped or report.out_of_time:
        release_failed_execution()  # not in the except clause, where the exception is still held
    report.stages = ray.get(tally.report.remote())


def _answer_wave(
    groups: pa.Table, terms: AnswerTerms, resources: AnswerResources, commits: Commits, tally: Any
) -> None:
    """One wave; questions whose answers are lost with a worker are asked again, each alone, then fail as lost."""
    waiting = set(_keys(groups))
    for _ in range(MAX_PASSES):
        for answers in _stage(groups, terms, resources, tally):
            is_new = []
            for key in zip(answers["write_id"].to_pylist(), answers["question_id"].to_pylist(), strict=True):
                is_new.append(key in waiting)
                waiting.discard(key)
            commits.add(answers.filter(pa.array(is_new, pa.bool_())))
        if not waiting:
            return
        groups = pa.Table.from_pylist(list(_alone(groups, waiting)), schema=tables.GROUPS)
    lost = TerminalError(ErrorCode.LOST, f"lost {MAX_PASSES} times with the workers that held it; ask again.")
    rows = [
        failed_answer(group, group["questions"][0], terms.recipe, terms.run_id, lost) for group in groups.to_pylist()
    ]
    commits.add(pa.Table.from_pylist(rows, schema=tables.ANSWERS))


def _keys(groups: pa.Table) -> Iterator[tuple[str, str]]:
    """The (write_id, question_id) of every question of some GROUPS."""
    write_ids = np.repeat(groups["write_id"].to_pylist(), pc.list_value_length(groups["questions"]).to_numpy())
    question_ids = pc.struct_field(pc.list_flatten(groups["questions"]), "question_id")
    return zip(write_ids.tolist(), question_ids.to_pylist(), strict=True)


def _alone(groups: pa.Table, waiting: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """A row of GROUPS for each question that waits."""
    for batch in groups.to_batches(max_chunksize=256):
        for group in batch.to_pylist():
            for question in group["questions"]:
                if (group["write_id"], question["question_id"]) in waiting:
                    yield {**group, "questions": [question]}


def _stage(groups: pa.Table, terms: AnswerTerms, resources: AnswerResources, tally: Any) -> Iterator[pa.Table]:
    """The stage on Ray Data: rows of GROUPS in, batches of tables.ANSWERS out as they land."""
    blocks = _blocks(groups, resources.questions_per_block)
    answers = ray.data.from_blocks(blocks).map_batches(
        Answerer,
        fn_constructor_args=(terms, tally, resources),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(resources.answerers, len(blocks))),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    return answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _blocks(groups: pa.Table, questions_per_block: int) -> list[pa.Table]:
    """GROUPS cut where so many questions are full: up to twice as many in a block, since no row is cut."""
    num_before = np.cumsum([0, *pc.list_value_length(groups["questions"]).to_pylist()])[:-1]
    starts = np.flatnonzero(np.diff(num_before // questions_per_block, prepend=-1)).tolist()
    return [groups.slice(start, end - start) for start, end in zip(starts, [*starts[1:], len(groups)], strict=True)]
