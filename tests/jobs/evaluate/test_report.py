import pytest

from longvlm.jobs.evaluate import report as evaluation
from longvlm.jobs.evaluate.report import differences, print_evaluation, save_report, side_by_side
from longvlm.jobs.evaluate.run import EvaluateReport
from longvlm.pipeline.judging.benchmarks import BENCHMARKS, ITEMS, Benchmark
from longvlm.pipeline.judging.score import Outcome
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot


def outcome(status="judged", **fields):
    item = dict.fromkeys(ITEMS.names) | {"question": "What | where?", "answer": "a dog", "type": "text"}
    return Outcome(item | {name: fields.pop(name) for name in list(fields) if name in item}, status, **fields)


@pytest.fixture
def labels():
    outcomes = [
        outcome(is_right=True, prediction="dog"),
        outcome(is_right=False, prediction="![x](http://evil)"),
        outcome("failed"),
    ]
    return EvaluateReport("run-1", Benchmark("labels:it's", typed=True), "exact#1", "m", "r1", outcomes)


@pytest.fixture
def scored():
    outcomes = [outcome(score=3.0, kind="a", raw_reply="{'score': 3.0}"), outcome("unparsed", kind="b")]
    return EvaluateReport("run-2", BENCHMARKS["videochatgpt-detail"], "http:j@h#1", "m", "r1", outcomes)


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


def test_a_person_is_told_the_reference_arithmetic_too(scored, capsys):
    print_evaluation(scored, None)
    shown = capsys.readouterr().out
    assert "In the reference's arithmetic (whole scores, what has no reply left out): score 3." in shown
    assert "1 of 2 (50.0 %) are missing: unparsed 1." in shown


def test_the_queries_run(labels):
    with catalog.connect(Snapshot()) as con:
        for query in (side_by_side(labels), differences(labels)):
            assert catalog.query(con, query).num_rows == 0
