import time
from io import StringIO

from rich.console import Console

from longvlm.jobs.cluster import activity, progress
from longvlm.jobs.cluster.tally import StageReporter, Tally


def test_bars_show_units_rates_and_what_is_left(monkeypatch):
    monkeypatch.setattr(progress, "POLL_S", 0.05)
    screen = Console(file=StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **_: screen)
    tally = Tally("bars")
    tally.begin("answer", ["a"])
    units = {"answer": "questions", "prefill": "tokens"}
    with progress.progress(tally, {"answer": 40, "prefill": None}, show=True, units=units):
        for _ in range(10):
            StageReporter("answer", tally).finish(["a", "b"], 0.1, 0.1)
            StageReporter("prefill", tally).add_tokens(500, 0.1)
            time.sleep(0.1)
        deadline = time.monotonic() + 60  # a busy machine draws seldom
        while "5000/?" not in screen.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
    shown = screen.file.getvalue()
    for text in ("questions/s", "tokens/s", "20/40", "5000/?", "left"):
        assert text in shown


def test_where_nobody_has_a_terminal_lines_tell_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    monkeypatch.setattr(progress, "_LINE_S", 0.01)
    tally, said = Tally("lines"), ""
    with progress.progress(tally, {"decode": 1200, "write": None}, show=True):
        tally.begin("decode", ["a", "b"])
        StageReporter("decode", tally).finish(["a", "b"], 0.1, 0.1)
        deadline = time.monotonic() + 60
        while "decode 2 of" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
            time.sleep(0.01)
    assert "decode 2 of 1,200 videos, write 0\n" in said
    assert said.count("decode 2 of") == 1


def test_work_of_this_process_is_a_line_where_nobody_has_a_terminal(capsys):
    with activity.shown(show=True):
        assert list(progress.shown_work(iter("ab"), "judging 2 answers", 2, show=True)) == ["a", "b"]
    assert "judging 2 answers\n" in capsys.readouterr().err
    assert list(progress.shown_work("ab", "judging", 2, show=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
