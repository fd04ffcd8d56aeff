import pytest

from longvlm.jobs.compare.report import Comparison, PathReport, print_comparison, save_plot
from longvlm.jobs.terminal import plot_folder
from longvlm.pipeline.engine.requests import Answer
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

FAILED = TerminalError(ErrorCode.PROMPT_TOO_LONG, "too long.")


def question(kind, right=None):
    return {"question_id": None, "question": "?", "type": kind, "choices": None, "schema": None, "right": right}


def path(name, *texts, stored=()):
    """Answers of the first video to the first questions; None for one that failed."""
    given = {
        (0, i): Answer((0, i), text, num_visual_tokens=10, error=None if text else FAILED)
        for i, text in enumerate(texts)
    }
    return PathReport(name, name, given, 2.0, list(stored))


def compared(*paths, questions=("text", "text")):
    rows = dict(enumerate(question(*(q if isinstance(q, tuple) else (q,))) for q in questions))
    return Comparison(rows, {"seed": 3}, baseline="a model.", videos=["/a.mp4"], paths=list(paths))


def test_agreement_is_of_what_the_baseline_answers_and_a_failure_agrees_with_nothing():
    comparison = compared(path("baseline", "a dog", None), path("full", "a dog", "a cat"), path("budget-8", None, None))
    assert [row["agreement"] for row in comparison.figures()] == [1.0, 1.0, 0.0]
    assert [row["failed"] for row in comparison.figures()] == [1, 0, 2]
    assert [row["agrees"] for row in comparison.rows()] == [True, None, True, None, False, None]
    assert {row["error"] for row in comparison.rows()} == {None, "too long."}
    nothing = compared(path("baseline", None), path("full", "a dog"))
    assert [row["agreement"] for row in nothing.figures()] == [None, None]


def test_accuracy_is_of_the_questions_whose_right_answer_is_known():
    asked = (("number", "3"), ("text", "A dog"), "text")
    comparison = compared(path("baseline", "3", "a dog.", "x"), path("full", "4", None, "y"), questions=asked)
    assert [row["accuracy"] for row in comparison.figures()] == [1.0, 0.0]
    assert [row["value"] for row in comparison.rows()] == [3, None, None, 4, None, None]


def test_the_table_leaves_out_what_there_is_nothing_of(capsys):
    print_comparison(compared(path("baseline", "x", "y"), path("full", "x", "y", stored=[123_456])), None)
    shown = capsys.readouterr().out
    assert "123,456" in shown
    assert "2 questions about 1 videos; seed 3" in shown
    assert not {"accuracy", "failed"} & set(shown.split())
    print_comparison(compared(path("baseline", "x", None)), None)
    assert "failed" in capsys.readouterr().out


def test_without_matplotlib_the_table_says_how_to_get_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("longvlm.jobs.compare.report.find_spec", lambda _: None)
    comparison = compared(path("baseline", "x", "y"), path("full", "x", "y"))
    plot = save_plot(comparison.figures(), tmp_path)
    assert plot is None
    print_comparison(comparison, plot)
    shown = capsys.readouterr().out
    assert "pip install 'longvlm-index[compare]'" in shown
    assert "agreement" in shown
    assert list(tmp_path.iterdir()) == []


def test_the_plot_is_drawn_for_whatever_is_known(tmp_path):
    folder = plot_folder(tmp_path / "new", "--out")
    for texts in (("x", "y"), (None, None)):
        comparison = compared(path("baseline", *texts), path("full", "x", "z"), path("budget-8", "x", "y"))
        plot = save_plot(comparison.figures(), folder)
        assert plot.read_bytes().startswith(b"\x89PNG")
        plot.unlink()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="use another --out"):
        plot_folder(tmp_path / "file", "--out")
