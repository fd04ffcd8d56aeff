"""The evaluate job: a benchmark, or somebody's own labels, to answers, verdicts and metrics.

1 items    question and answer files -> what is asked and what is right    driver
2 answer   what is not answered yet                                        the answer job
3 judge    what is not judged yet, as many at a time as the judge takes    driver, its threads
4 commit   verdicts every 15 s, every 1000, and at the end                 driver
5 score    averages, and what is missing                                   driver
"""

import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.cluster import logs
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.progress import shown_work
from longvlm.jobs.evaluate.verdicts import (
    AnsweredItem,
    Verdicts,
    is_judge_unreachable,
    match_videos,
    questions_of,
    read_answered,
)
from longvlm.jobs.limits import INTERRUPTED
from longvlm.jobs.runs import close_run
from longvlm.pipeline.judging import score
from longvlm.pipeline.judging.benchmarks import BENCHMARKS, Benchmark, labels_benchmark, read_items
from longvlm.pipeline.judging.judges import ChatJudge, ExactJudge, Judge
from longvlm.pipeline.judging.score import QuestionResult
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.recipe import Precision

_MOST_OUT_OF_REACH = 8  # verdicts in a row, each after its own tries, before a judge is given up


@dataclass(frozen=True)
class JudgeOrder:
    """The order of a judge: exact match, unless a model is named."""

    url: str | None = None  # of an OpenAI-compatible API
    model: str | None = None  # its name there; without a URL a folder or hub id
    key_variable: str | None = None  # the environment variable that holds the API's key


@dataclass(frozen=True)
class EvaluateOrder:
    """The order of an evaluation: what to evaluate, on what, and who judges."""

    store: str
    benchmark: str | None = None  # one of BENCHMARKS
    questions: str | None = None  # its question file
    answers: str | None = None  # its answer file, where the questions come without
    labels: str | None = None  # or somebody's own right answers
    model: str | None = None
    budget: int | None = None
    precision: Precision = "bfloat16"
    max_new_tokens: int = 256
    judge: JudgeOrder = field(default_factory=JudgeOrder)
    ray_address: str | None = None
    show_progress: bool = False


@dataclass
class EvaluateReport:
    """The report of an evaluation."""

    run_id: str
    benchmark: Benchmark
    judge: str = ""
    model: str = ""
    answer_recipe: str = ""
    results: list[QuestionResult] = field(default_factory=list)  # in the order of the file
    num_reused: int = 0  # verdicts that were known
    num_new: int = 0  # verdicts that the judge was asked for
    wall_s: float = 0.0
    stopped: str | None = None
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # those of the answer run stand in its own row
    notes: list[str] = field(default_factory=list)

    @property
    def is_labels(self) -> bool:
        """Whether these are somebody's own labels, which are reported question by question."""
        return self.benchmark.name.startswith("labels:")

    def by_question(self) -> list[dict[str, Any]]:
        """Precision, recall and confusion by question; see `score.metrics_by_question`."""
        return score.metrics_by_question(self.results)

    def means(self) -> dict[str, float | None]:
        """The plain means over questions of precision and recall."""
        found = {measure: [one[measure] for one in self.by_question()] for measure in ("precision", "recall")}
        known = {measure: [value for value in values if value is not None] for measure, values in found.items()}
        return {measure: fmean(values) if values else None for measure, values in known.items()}

    def summary(self) -> dict[str, Any]:
        """The metrics, and what they are of; this goes into the table `runs`."""
        kinds = score.metrics_by_kind(self.results)
        measure = "score" if self.benchmark.needs_model else "accuracy"
        found = score.compute_metrics(self.results)
        told = {
            "benchmark": self.benchmark.name,
            "dimension": self.benchmark.dimension,
            "model": self.model,
            "answer_recipe": self.answer_recipe,
            "judge": self.judge,
            **found,
            "calibration_error": score.confidence_error(self.results),
            "as_reference": score.reference_metrics(self.results, self.benchmark.dimension),
            "by_kind": {kind: of_kind[measure] for kind, of_kind in kinds.items()},
            "num_by_kind": {kind: of_kind["num_questions"] for kind, of_kind in kinds.items()},
        }
        counts = {"verdicts_reused": self.num_reused, "verdicts_new": self.num_new}
        return {
            **told,
            **counts,
            "wall_s": round(self.wall_s, 3),
            "stopped": self.stopped,
            "run_id": self.run_id,
        }

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm evaluate --json` ends with; of labels also precision and recall, by question too."""
        told = self.summary()
        return told | self.means() | {"by_question": self.by_question()} if self.is_labels else told


def run_evaluate(order: EvaluateOrder) -> EvaluateReport:
    """Evaluate: ask what is not answered, judge what is not judged, compute metrics, and note the run in the store.

    Raises:
        InputError: the files, store, model or judge cannot be used; verdicts that came before are kept.
    """
    started_s = time.time()
    benchmark = choose_benchmark(order)
    path = order.labels or order.questions or ""
    doing(f"reading {path}")
    items = read_items(benchmark, path, order.answers).to_pylist()
    if order.judge.model is not None and order.judge.url is None:
        doing(f"loading the judge {order.judge.model}")
    judge = open_judge(order.judge, benchmark)
    doing("reading the store and the model")
    store = Store.open(order.store)
    spec, stored = choose_answer_model(store, order.model)
    report = EvaluateReport(new_run_id(), benchmark, judge.name, spec.name)
    items, num_unknown = match_videos(store, benchmark, items)
    if num_unknown == len(items):
        raise InputError(
            f"not one of the videos that {path} names is in the store {store.uri}; index them first, or name another."
        )
    asked = AnswerOrder(
        order.store,
        questions_of(benchmark, items),
        model=order.model,
        budget=order.budget,
        precision=order.precision,
        max_new_tokens=order.max_new_tokens,
        ray_address=order.ray_address,
        show_progress=order.show_progress,
    )
    answering = run_answer(asked)
    report.answer_recipe = answering.asking.answer_recipe
    report.stopped = answering.stopped
    answered = read_answered(store, benchmark, items, stored.fingerprint, report.answer_recipe)
    _judge(Verdicts(store, benchmark, judge, report.run_id, report.answer_recipe), answered, report, order)
    if num_unknown:
        report.notes.append(f"questions about videos that the store does not know: {num_unknown:,}; they are missing.")
    report.wall_s = time.time() - started_s
    logs.ended("evaluate", report.run_id, report.summary(), report.stopped)
    close_run(store, "evaluate", report, report.summary())
    return report


def _judge(verdicts: Verdicts, answered: list[AnsweredItem], report: EvaluateReport, order: EvaluateOrder) -> None:
    """Stages 3 and 4; makes the results. A judge that is out of reach, or Ctrl-C, ends them early."""
    logs.begun("evaluate", report.run_id, store=order.store, judge=report.judge)
    results = [QuestionResult(one.item, one.status if one.status != "answered" else "not_judged") for one in answered]
    num_out_of_reach = 0
    rows = verdicts.judge_answers(answered, may_ask=report.stopped is None)
    total = sum(one.status == "answered" for one in answered)
    shown = shown_work(rows, f"judging {total:,} answers", total, show=order.show_progress)
    try:
        for place, row in shown:
            results[place] = _result(answered[place], row)
            num_out_of_reach = num_out_of_reach + 1 if is_judge_unreachable(row) else 0
            if num_out_of_reach >= _MOST_OUT_OF_REACH:
                report.stopped = f"the judge cannot be reached: {row['error']}"
                break
    except KeyboardInterrupt:
        report.stopped = INTERRUPTED
    finally:
        rows.close()
    report.results = results
    report.num_reused, report.num_new = verdicts.num_reused, verdicts.num_new


def _result(answered: AnsweredItem, row: dict[str, Any]) -> QuestionResult:
    said = {name: row[name] for name in ("status", "score", "is_right", "prediction", "raw_reply")}
    return QuestionResult(answered.item, confidence=(answered.given or {}).get("confidence"), **said)


def choose_benchmark(order: EvaluateOrder) -> Benchmark:
    """The benchmark that an order names, or its labels as one.

    Raises:
        InputError: it names both, neither or one that there is not, or lacks its question file.
    """
    if (order.labels is None) == (order.benchmark is None):
        raise InputError(
            "name either a benchmark (--benchmark NAME --questions FILE) or your own labels (--labels FILE)."
        )
    if order.labels is not None:
        if order.questions or order.answers:
            raise InputError("--questions and --answers go with --benchmark; labels hold both in one file.")
        return labels_benchmark(order.labels)
    benchmark = BENCHMARKS.get(order.benchmark or "")
    if benchmark is None:
        raise InputError(f"there is no benchmark {order.benchmark}; name one of {', '.join(BENCHMARKS)}.")
    if order.questions is None:
        raise InputError(f"the benchmark {benchmark.name} needs its question file: --questions FILE.")
    return benchmark


def open_judge(order: JudgeOrder, benchmark: Benchmark) -> Judge:
    """The judge that an order names.

    Raises:
        InputError: its parts do not go together, it cannot be used, or the benchmark needs a model as judge.
    """
    if order.model is None:
        if order.url or order.key_variable:
            raise InputError("a judge at a URL needs the name of its model: --judge-model NAME.")
        if benchmark.needs_model:
            raise InputError(
                f"free answers as in {benchmark.name} need a model as judge: --judge-url URL --judge-model NAME, or "
                "--judge-model FOLDER."
            )
        return ExactJudge()
    if order.url is None:
        if order.key_variable:
            raise InputError("--judge-key-env goes with --judge-url; a model on this machine needs no key.")
        from longvlm.pipeline.judging.judge_local import LocalChatModel

        return ChatJudge(LocalChatModel(order.model))
    from longvlm.pipeline.judging.judge_http import HttpChatModel

    return ChatJudge(HttpChatModel(order.url, order.model, order.key_variable))
