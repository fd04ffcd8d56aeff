import builtins

import pytest
from reference_outputs import read_json

from longvlm.pipeline.judging.score import (
    QuestionResult,
    compute_metrics,
    confidence_error,
    metrics_by_kind,
    metrics_by_question,
    reference_average,
    reference_metrics,
)
from support import GOLDENS, parameters

ITEM = {
    "question": "q",
    "question2": None,
    "answer": "a",
    "type": "text",
    "choices": None,
    "schema": None,
    "kind": None,
}


def result(status="judged", **fields):
    item = {name: fields.pop(name) for name in list(fields) if name in ITEM}
    return QuestionResult(ITEM | item, status, **fields)


def test_averages_are_over_what_was_judged_and_say_what_is_missing():
    results = [result(score=4.5, is_right=True), result(score=1.5, is_right=False)]
    results += [result("unparsed"), result("not_in_store"), result("not_in_store")]
    assert compute_metrics(results) == {
        "num_questions": 5,
        "num_judged": 2,
        "num_missing": 3,
        "missing_share": 0.6,
        "missing": {"unparsed": 1, "not_in_store": 2},
        "score": 3.0,
        "score_missing_as_zero": 1.2,
        "accuracy": 0.5,
        "accuracy_missing_as_wrong": 0.2,
    }


def test_where_nothing_was_judged_there_is_no_average():
    found = compute_metrics([result("failed")])
    assert (found["score"], found["accuracy"], found["missing_share"]) == (None, None, 1.0)
    assert compute_metrics([])["missing_share"] == 0


def test_confidences_are_held_against_what_was_right():
    assert confidence_error([result(is_right=True), result("failed", confidence=0.9)]) is None
    results = [result(is_right=right, confidence=0.9) for right in (True, True, False, False)]
    assert confidence_error(results) == pytest.approx(0.4)


def test_kinds_are_counted_apart():
    results = [result(kind="b", is_right=True), result(kind="a", is_right=False), result("failed", kind="a")]
    found = metrics_by_kind([*results, result(is_right=True)])
    assert {kind: (of["accuracy"], of["num_questions"]) for kind, of in found.items()} == {"a": (0, 2), "b": (1, 1)}


def test_precision_recall_and_confusion_by_question():
    pairs = [("yes", "Yes"), ("yes", "No"), ("no", "Yes"), ("no", "No"), ("no", "No"), ("no", "what?")]
    pairs = [(right, said, right == said.lower()) for right, said in pairs]
    results = [result(type="bool", answer=right, prediction=said, is_right=is_so) for right, said, is_so in pairs]
    texts = [result(question="t", answer="A dog.", prediction=said, is_right=said == "dog") for said in ("dog", "cat")]
    typed, free = metrics_by_question([*results, *texts, result("failed", question="t")])
    assert typed["confusion"] == {"false": {"true": 1, "false": 2, "(none)": 1}, "true": {"true": 1, "false": 1}}
    assert typed["classes"]["false"] == {"precision": 2 / 3, "recall": 0.5, "support": 4}
    assert typed["classes"]["true"] == {"precision": 0.5, "recall": 0.5, "support": 2}
    assert typed["precision"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert (typed["recall"], typed["accuracy"]) == (0.5, 0.5)
    assert free["confusion"] == {"dog": {"dog": 1, "cat": 1}}
    assert (free["precision"], free["recall"], free["num_missing"]) == (1.0, 0.5, 1)


def test_as_the_reference_counts_replies():
    results = [result(raw_reply="{'score': 4.8}"), result("unparsed", raw_reply="prose"), result("failed")]
    assert reference_metrics(results, "detail") == {"score": 4.0}
    assert reference_metrics([*results, result(raw_reply="{'points': 1}")], "detail") is None
    assert reference_metrics(results[1:], "detail") is None


# --- held to what the reference printed ---

SCRIPTS = {
    "evaluate_benchmark_1_correctness.py": "correctness",
    "evaluate_benchmark_2_detailed_orientation.py": "detail",
    "evaluate_benchmark_3_context.py": "context",
    "evaluate_benchmark_4_temporal.py": "temporal",
    "evaluate_benchmark_5_consistency.py": "consistency",
    "evaluate_activitynet_qa.py": "qa",
}


def reference_runs(wanted):
    """Pytest parameters for dimension and outcome of those of the reference's runs that are wanted."""
    scripts = read_json("eval_golden.json").get("runs", {}) if (GOLDENS / "eval_golden.json").is_file() else {}
    runs = [(SCRIPTS[script], name, run) for script, of in scripts.items() for name, run in of.items()]
    named = [(f"{dimension}-{name}", (dimension, run)) for dimension, name, run in runs if wanted(dimension, run)]
    return parameters(named, GOLDENS, "runs in eval_golden.json")


def printed_by(run):
    return [float(line.rpartition(" ")[2]) for line in run["printed_tail"]]


@pytest.mark.parity
@pytest.mark.parametrize("reference", reference_runs(lambda *_: True))
def test_the_reference_arithmetic_is_the_references(reference):
    dimension, run = reference
    replies = [reply for reply, _ in run["combined"].values()]
    if run["error"] is not None:
        with pytest.raises(getattr(builtins, run["error"].partition(":")[0])):
            reference_average(replies, dimension)
    else:
        found = reference_average(replies, dimension)
        printed = printed_by(run)[-2:] if dimension == "qa" else printed_by(run)
        assert list(found.values()) == printed


def is_plain_average(dimension, run):
    return dimension != "qa" and run["error"] is None and all("score" in reply for reply, _ in run["combined"].values())


@pytest.mark.parity
@pytest.mark.parametrize("reference", reference_runs(is_plain_average))
def test_where_ours_differs_from_the_references_and_why(reference):
    """Fractions are kept, and what is missing is told."""
    _, run = reference
    scores = [float(reply["score"]) for reply, _ in run["combined"].values()]
    num_questions = len(run["attempts_per_item"])
    num_missing = num_questions - len(scores)
    found = compute_metrics([*(result(score=score) for score in scores), *[result("unparsed")] * num_missing])
    cut_off = sum(score % 1 for score in scores) / len(scores)
    assert found["score"] == pytest.approx(printed_by(run)[0] + cut_off)
    assert found["score_missing_as_zero"] == pytest.approx(sum(scores) / num_questions)
    assert (found["num_missing"], found["num_questions"]) == (num_missing, num_questions)
