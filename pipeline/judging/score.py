"""Metrics of an evaluation: averages that say what is missing, and precision and recall by question."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from longvlm.pipeline.answering.typed import read_value
from longvlm.pipeline.judging.agreement import normalised, right_value
from longvlm.pipeline.judging.calibration import calibration_error
from longvlm.pipeline.judging.judges import reply_dict

JUDGED = "judged"
NO_VALUE = "(none)"  # what was answered, where that is not of the question's type


@dataclass(frozen=True)
class QuestionResult:
    """The result of one question of a benchmark."""

    question: dict[str, Any]  # a row of benchmarks.ITEMS
    status: str  # judged, or why there is no verdict: not_in_store, not_answered, unparsed, failed, ...
    score: float | None = None
    is_right: bool | None = None
    prediction: str | None = None
    raw_reply: str | None = None
    confidence: float | None = None  # of the model in its answer, where its question has options


def compute_metrics(results: Sequence[QuestionResult]) -> dict[str, Any]:
    """Average score and accuracy over what was judged, beside how much is missing and what they are if that counts 0.

    Returns:
        num_questions, num_judged, num_missing, missing_share and missing (why, how many); score, from 0 to 5, and
        score_missing_as_zero; accuracy and accuracy_missing_as_wrong. None where a judge gives no such figure, or
        nothing was judged.
    """
    judged = [result for result in results if result.status == JUDGED]
    num_missing = len(results) - len(judged)
    found: dict[str, Any] = {
        "num_questions": len(results),
        "num_judged": len(judged),
        "num_missing": num_missing,
        "missing_share": num_missing / len(results) if results else 0.0,
        "missing": dict(Counter(result.status for result in results if result.status != JUDGED)),
    }
    scores = [result.score for result in judged if result.score is not None]
    rights = [result.is_right for result in judged if result.is_right is not None]
    return found | {
        "score": fmean(scores) if scores else None,
        "score_missing_as_zero": sum(scores) / len(results) if scores else None,
        "accuracy": fmean(rights) if rights else None,
        "accuracy_missing_as_wrong": sum(rights) / len(results) if rights else None,
    }


def confidence_error(results: Iterable[QuestionResult]) -> float | None:
    """The expected calibration error of the model's confidences; None where its answers have none, or none is judged.

    See `calibration.calibration_error`.
    """
    known = [one for one in results if one.confidence is not None and one.is_right is not None]
    return calibration_error([one.confidence or 0.0 for one in known], [bool(one.is_right) for one in known])


def metrics_by_kind(results: Iterable[QuestionResult]) -> dict[str, dict[str, Any]]:
    """The metrics of each kind of question, where the benchmark's file says one."""
    groups: dict[str, list[QuestionResult]] = defaultdict(list)
    for result in results:
        if result.question["kind"] is not None:
            groups[result.question["kind"]].append(result)
    return {kind: compute_metrics(groups[kind]) for kind in sorted(groups)}


def metrics_by_question(results: Iterable[QuestionResult]) -> list[dict[str, Any]]:
    """Metrics of each question that is asked of several videos: a dict a question, in the order of first sight.

    Each has what `compute_metrics` gives, `classes` (by right answer: precision, recall, support), precision and recall
    (their plain means over the right answers' classes) and `confusion` {right answer: {given answer: count}}. The
    class of a typed answer is its value, that of a text the text as `normalised`. A class that nothing was taken for
    has precision 0.
    """
    groups: dict[tuple[str, str], list[QuestionResult]] = defaultdict(list)
    for result in results:
        groups[result.question["question"], result.question["type"]].append(result)
    found = []
    for (question, kind), members in groups.items():
        confusion: dict[str, Counter[str]] = defaultdict(Counter)
        for result in members:
            if result.status == JUDGED:
                confusion[_right_class(result)][_given_class(result)] += 1
        classes = {name: _class_figures(confusion, name) for name in sorted(confusion)}
        means = {
            measure: fmean(one[measure] for one in classes.values()) if classes else None
            for measure in ("precision", "recall")
        }
        told = {name: dict(given) for name, given in sorted(confusion.items())}
        found.append({"question": question, "type": kind, **compute_metrics(members), **means, "classes": classes})
        found[-1]["confusion"] = told
    return found


def _class_figures(confusion: dict[str, Counter[str]], name: str) -> dict[str, float]:
    hits, support = confusion[name][name], confusion[name].total()
    num_taken = sum(given[name] for given in confusion.values())
    return {"precision": hits / num_taken if num_taken else 0.0, "recall": hits / support, "support": support}


def _right_class(result: QuestionResult) -> str:
    item = result.question
    return normalised(item["answer"]) if item["type"] == "text" else right_value(item, item["answer"]) or NO_VALUE


def _given_class(result: QuestionResult) -> str:
    """The class that an answer falls in: the right one if the judge says so, whatever its words."""
    if result.is_right:
        return _right_class(result)
    item, said = result.question, result.prediction or ""
    return (normalised(said) if item["type"] == "text" else read_value(item, said)) or NO_VALUE


def reference_metrics(results: Iterable[QuestionResult], dimension: str) -> dict[str, float] | None:
    """Metrics of the same replies in the reference's arithmetic; None where that breaks off or nothing was replied."""
    replies = [said for result in results if result.raw_reply and (said := reply_dict(result.raw_reply))]
    with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        return reference_average(replies, dimension)
    return None


def reference_average(replies: Iterable[dict[str, Any]], dimension: str) -> dict[str, float]:
    """Average judges' replies as LongVLM's scripts do, for comparison with published numbers (LONGVLM.md, section 8).

    Scores are cut to whole numbers, whatever has no reply is left out, a missing score is 0 for correctness. A `pred`
    with "yes" in it is a match, else one with "no" in it is none, "unknown" included; a reply without it is skipped.

    Raises:
        KeyError: a score is missing in another dimension than correctness.
        ValueError: a score is a text such as "4.8".
        ZeroDivisionError: there are no replies.
    """
    if dimension != "qa":
        scores = [int(reply.get("score", 0) if dimension == "correctness" else reply["score"]) for reply in replies]
        return {"score": sum(scores) / len(scores)}
    matched = [(str(reply["pred"]).lower(), int(reply["score"])) for reply in replies if "pred" in reply]
    num_yes = sum("yes" in pred for pred, _ in matched)
    num_no = sum("no" in pred and "yes" not in pred for pred, _ in matched)
    return {
        "accuracy": num_yes / (num_yes + num_no),
        "score": sum(score for _, score in matched) / len(matched),
    }
