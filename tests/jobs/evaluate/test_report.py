import pytest

from longvlm.jobs.evaluate import report as evaluation
from longvlm.jobs.evaluate.report import comparison_query, differences_query, print_evaluation, save_report
from longvlm.jobs.evaluate.run import EvaluateReport
from longvlm.pipeline.judging.benchmarks import BENCHMARKS, ITEMS, Benchmark
from longvlm.pipeline.judging.score import QuestionResult
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot


def result(status="judged", **fields):
    item = dict.fromkeys(ITEMS.names) | {"question": "What | where?", "answer": "a dog", "type": "text"}
    return QuestionResult(item | {name: fields.pop(name) for name in list(fields) if name in item}, status, **fields)


@pytest.fixture
def labels():
    results = [
        result(is_right=True, prediction="dog"),
        result(is_right=False, prediction="![x](http://evil)"),
        result("failed"),
    ]
    return EvaluateReport("run-1", Benchmark("labels:it's", is_typed=True), "exact#1", "m", "r1", results)


@pytest.fixture
def scored():
    results = [result(score=3.0, kind="a", raw_reply="{'score': 3.0}"), result("unparsed", kind="b")]
    return EvaluateReport("run-2", BENCHMARKS["videochatgpt-detail"], "http:j@h#1", "m", "r1", results)


def test_a_report_says_what_is_missing_and_obeys_no_markup_of_answers(labels, tmp_path):
    text = save_report(labels, tmp_path).read_text()
    assert "| all | 3 | 1 | 0.500 | 0.333 | 1.000 | 0.500 |" in text
    assert "1 of 3 (33.3 %) are missing: failed 1." in text
    assert "## What \\| where?" in text
    assert "| dog | x\\](http://evil | 1 |" in text
    assert "(report.png)" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_matplotlib_says_so(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    text = save_report(scored, tmp_path).read_text()
    assert "There is no plot, because matplotlib is not installed" in text
    assert "| a | 1 | 0 | 3.000 | 3.000 |\n| b | 1 | 1 |  |  |" in text
    assert not (tmp_path / "report.png").exists()


def test_many_questions_are_drawn_as_a_distribution(labels, tmp_path):
    few = save_report(labels, tmp_path).with_suffix(".png").read_bytes()
    labels.results += [result(is_right=i % 3 == 0, prediction="x", question=f"question {i}?") for i in range(600)]
    many = save_report(labels, tmp_path).with_suffix(".png").read_bytes()
    heights = [int.from_bytes(png[20:24], "big") for png in (few, many)]  # of the PNG's header, in pixels
    assert heights[1] == 400 > heights[0]  # no bar a question


def test_a_person_is_told_the_reference_arithmetic_too(scored, capsys):
    print_evaluation(scored, None)
    shown = capsys.readouterr().out
    assert "In the reference's arithmetic (whole scores, what has no reply left out): score 3." in shown
    assert "1 of 2 (50.0 %) are missing: unparsed 1." in shown


def test_a_person_is_told_how_far_confidences_are_from_the_truth(tmp_path, capsys):
    results = [result(is_right=right, type="bool", confidence=0.95) for right in (True, False)]
    report = EvaluateReport("run-3", BENCHMARKS["tinyworld-bool"], "exact#1", "m", "r1", results)
    print_evaluation(report, None)
    assert "Confidences are 45.0 points from the share that is right" in capsys.readouterr().out
    assert "Confidences are 45.0 points" in save_report(report, tmp_path).read_text()
    assert report.as_json()["calibration_error"] == pytest.approx(0.45)


def test_the_queries_run(labels):
    with catalog.connect(Snapshot()) as con:
        for query in (comparison_query(labels), differences_query(labels)):
            assert catalog.query(con, query).num_rows == 0
