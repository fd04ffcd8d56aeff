import json

import pytest

from longvlm.pipeline.judging.score import (
    QuestionResult,
    compute_metrics,
    metrics_by_kind,
    metrics_by_question,
    reference_average,
    reference_metrics,
)

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


def reference_runs(goldens):
    runs = json.loads((goldens / "eval_golden.json").read_text())["runs"]
    return [(SCRIPTS[script], name, run) for script, cases in runs.items() for name, run in cases.items()]


@pytest.mark.parity
def test_the_reference_arithmetic_is_the_references(goldens):
    compared = 0
    for dimension, name, run in reference_runs(goldens):
        replies = [reply for reply, _ in run["combined"].values()]
        if run["error"] is not None:
            error = {"KeyError": KeyError, "ValueError": ValueError, "ZeroDivisionError": ZeroDivisionError}
            with pytest.raises(error[run["error"].partition(":")[0]]):
                reference_average(replies, dimension)
        else:
            found = reference_average(replies, dimension)
            printed = [float(line.rpartition(" ")[2]) for line in run["printed_tail"]]
            expected = printed[-2:] if dimension == "qa" else printed
            assert list(found.values()) == expected, (dimension, name)
        compared += 1
    assert compared == 20


@pytest.mark.parity
def test_where_ours_differs_from_the_references_and_why(goldens):
    """Fractions are kept, what is missing is told, and 'unknown' is no verdict."""
    for dimension, name, run in reference_runs(goldens):
        if dimension != "correctness" or name != "one_unparseable":
            continue
        scores = [float(reply["score"]) for reply, _ in run["combined"].values()]
        found = compute_metrics([*(result(score=score) for score in scores), result("unparsed")])
        assert found["score"] == pytest.approx(14.8 / 5)  # the reference: 2.8
        assert found["score_missing_as_zero"] == pytest.approx(14.8 / 6)
        assert (found["num_missing"], found["num_questions"]) == (1, 6)
