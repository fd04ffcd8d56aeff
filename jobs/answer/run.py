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

from longvlm.jobs.answer.estimate import estimate
from longvlm.jobs.answer.options import check_vocabulary, fit_budget, fit_focus, fit_template, note_decoding
from longvlm.jobs.answer.plan import Asking, plan
from longvlm.jobs.answer.terms import AnswerTerms, failed_answer
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.commits import Commits
from longvlm.jobs.cluster.executor import Executor, OutOfTimeError, Stage, StageError
from longvlm.jobs.cluster.open_executor import open_executor
from longvlm.jobs.cluster.progress import progress
from longvlm.jobs.cluster.resources import COMMIT_ANSWERS, GROWTH, MAX_PASSES, AnswerResources, for_answer
from longvlm.jobs.limits import INTERRUPTED
from longvlm.jobs.runs import close_run
from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.store.ledger import RegisteredRecipe, Store
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
        return islice(self.asking.answers(self.store.pin(("answers",)), self.run_id), limit)

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
        close_run(report.store, "answer", report)
    return report


def answer_questions(order: AnswerOrder) -> AnswerReport:
    """Stages 1 to 4, about the live videos of a store.

    Raises:
        InputError: the store, model, predicate, a question's video or the budget cannot be used, or the model's
            vocabulary cannot spell an answer; nothing is written.
    """
    started_s = time.time()
    doing("reading the store and the model")
    store = Store.open(order.store)
    spec, stored = choose_answer_model(store, order.model)
    recipe = recipe_for(order, spec, stored)
    doing("planning what to ask")
    snapshot = store.pin()
    report = AnswerReport(new_run_id(), store, plan(snapshot, order.questions, recipe, order.where, order.limit))
    check_vocabulary(spec, report.asking.held_by_grammars())
    if report.asking.num_pending and (note := note_decoding(spec, recipe)):
        report.notes.append(note)
    if order.dry_run:
        report.estimate = estimate(report.asking, recipe, stored.recipe, spec.sight.num_global_tokens, snapshot)
    elif report.asking.num_pending:
        executor = open_executor(order.ray_address)
        tower = stored.recipe.tower
        search_model = None if tower.search_dim is None else tower.name
        terms = AnswerTerms(recipe, spec.sight, snapshot, report.run_id, search_model)
        resources = for_answer(executor.resources(), report.asking.num_pending, order.kv_gb)
        logs.begun("answer", report.run_id, store=store.uri, model=recipe.model)
        end_s = None if order.max_hours is None else started_s + order.max_hours * 3600
        _answer_waves(_AnswerRun(terms, resources, executor, report, end_s), show=order.show_progress)
        logs.ended("answer", report.run_id, report.as_json(), report.stopped)
    report.wall_s = time.time() - started_s
    return report


def recipe_for(order: AnswerOrder, spec: ModelSpec, stored: RegisteredRecipe) -> AnswerRecipe:
    """How a model answers an order from what a stored recipe keeps. Raises InputError where it cannot."""
    return AnswerRecipe(
        model=spec.name,
        weights=spec.weights,
        index_recipe=stored.fingerprint,
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


class _AnswerRun:
    """What the waves of a run share.

    Args:
        terms: what is asked, of which tokens.
        resources: of the stage.
        executor: where it runs.
        report: counts what is committed.
        end_s: when the time of the run is over, in seconds since the epoch; None: never.
    """

    def __init__(
        self,
        terms: AnswerTerms,
        resources: AnswerResources,
        executor: Executor,
        report: AnswerReport,
        end_s: float | None,
    ) -> None:
        self.terms, self.resources, self.executor, self.report, self.end_s = terms, resources, executor, report, end_s
        self.tally = executor.start_tally(report.run_id)
        store = report.store
        self.commits: Commits[pa.Table] = Commits(
            store.uri,
            "answer",
            report.run_id,
            lambda parts: store.append("answers", pa.concat_tables(parts)),
            most_rows=COMMIT_ANSWERS,
        )

    def answer_wave(self, groups: pa.Table) -> None:
        """One wave; questions whose answers are lost with a worker are asked again, each alone, then fail as lost.

        Raises:
            OutOfTimeError: there is no time for more.
            StageError: the stage broke off.
        """
        waiting = set(_keys(groups))
        for _ in range(MAX_PASSES):
            for answers in self.stage(groups):
                is_new = []
                for key in zip(answers["write_id"].to_pylist(), answers["question_id"].to_pylist(), strict=True):
                    is_new.append(key in waiting)
                    waiting.discard(key)
                self._add(answers.filter(pa.array(is_new, pa.bool_())))
            if not waiting:
                return
            groups = pa.Table.from_pylist(list(_alone(groups, waiting)), schema=tables.GROUPS)
        lost = TerminalError(ErrorCode.LOST, f"lost {MAX_PASSES} times with the workers that held it; ask again.")
        recipe, run_id = self.terms.recipe, self.terms.run_id
        rows = [failed_answer(group, group["questions"][0], recipe, run_id, lost) for group in groups.to_pylist()]
        self._add(pa.Table.from_pylist(rows, schema=tables.ANSWERS))

    def stage(self, groups: pa.Table) -> Iterator[pa.Table]:
        """Stage 2: rows of GROUPS in, batches of tables.ANSWERS out as they land."""
        from longvlm.jobs.answer.stage import Answerer  # torch, for seconds: a run that finds all answered needs none

        resources = self.resources
        blocks = _blocks(groups, resources.questions_per_block)
        workers = min(resources.answerers, len(blocks))
        args = (self.terms, self.tally, resources)
        most = min(GROWTH * resources.answerers, len(blocks))
        stage = Stage(Answerer, args, None, workers, resources.cpus, resources.gpus, most=most)
        return self.executor.run(blocks, [stage], self.end_s)

    def flush(self) -> None:
        """Commit what is answered."""
        self._count(self.commits.flush())

    def _add(self, answers: pa.Table) -> None:
        if len(answers):
            self._count(self.commits.add(answers, len(answers)))
        num_left = self.report.asking.num_pending - self.report.given.total() - self.commits.num_rows
        metrics.QUEUE.record(num_left, job="answer")
        if self.end_s is not None and time.time() > self.end_s:
            raise OutOfTimeError

    def _count(self, committed: list[pa.Table]) -> None:
        for answers in committed:
            self.report.given.update(answers["status"].to_pylist())


def _answer_waves(run: _AnswerRun, *, show: bool) -> None:
    """Stages 2 to 4, wave by wave; what is answered when a run is stopped is kept."""
    report = run.report
    expected = {"answer": report.asking.num_pending, "prefill": None, "decode": None}
    try:
        with progress(run.tally, expected, show=show, units=_UNITS):
            for wave in report.asking.waves(run.resources.questions_per_block):
                run.answer_wave(wave)
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    except OutOfTimeError:
        report.out_of_time = True
    except StageError as error:
        report.stopped = str(error)
    finally:
        run.flush()
        metrics.QUEUE.record(0, job="answer")  # nothing waits any more, whatever is left
    if report.stopped or report.out_of_time:
        run.executor.release()  # not in an except clause, where the exception is still held
    report.stages = run.tally.report()


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


def _blocks(groups: pa.Table, questions_per_block: int) -> list[pa.Table]:
    """GROUPS cut where so many questions are full: up to twice as many in a block, since no row is cut."""
    num_before = np.cumsum([0, *pc.list_value_length(groups["questions"]).to_pylist()])[:-1]
    starts = np.flatnonzero(np.diff(num_before // questions_per_block, prepend=-1)).tolist()
    return [groups.slice(start, end - start) for start, end in zip(starts, [*starts[1:], len(groups)], strict=True)]
