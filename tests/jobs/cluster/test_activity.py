import re
import sys
import time
from io import StringIO

import pytest

from longvlm.jobs.cluster import activity
from longvlm.jobs.cluster.activity import doing, is_shown, make_room, shown, spell_elapsed


class Terminal(StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_where_nobody_has_a_terminal_each_step_is_a_line_with_the_time_so_far(capsys):
    with shown(show=True):
        doing("listing /videos\x1b[31m")
        doing("starting Ray")
        make_room()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r" +\d\.\d s  ", " N s  ", line) for line in lines] == [
        r"longvlm: N s  listing /videos\x1b[31m",
        "longvlm: N s  starting Ray",
    ]


def test_a_terminal_shows_one_line_that_moves_and_is_gone_at_the_end(monkeypatch):
    screen = open_terminal(monkeypatch)
    with shown(show=True):
        doing("listing /videos")
        first = screen.getvalue()
        until = time.monotonic() + 60
        while "listing /videos ... 0.1 s" not in screen.getvalue():
            assert time.monotonic() < until
            time.sleep(0.02)
    assert "listing /videos ... 0.0 s" in first
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().endswith(activity._ERASE)


def test_what_else_is_written_finds_an_empty_line_and_nothing_is_drawn_over_it(monkeypatch):
    screen = open_terminal(monkeypatch)
    with shown(show=True):
        doing("listing /videos")
        make_room()
        assert screen.getvalue().endswith(activity._ERASE)
        before = screen.getvalue()
        time.sleep(3 * activity._REDRAW_S)
        assert screen.getvalue() == before


def test_without_a_command_or_a_person_nothing_is_said(capsys):
    doing("listing /videos")
    with shown(show=False):
        doing("listing /videos")
        assert not is_shown()
    with shown(show=True):
        assert is_shown()
    assert not is_shown()
    assert capsys.readouterr() == ("", "")


def test_a_stream_that_nobody_reads_any_more_stops_nothing(monkeypatch):
    closed = StringIO()
    closed.close()
    closed.isatty = lambda: False
    monkeypatch.setattr(sys, "stderr", closed)
    with shown(show=True):
        doing("listing /videos")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (59.94, "59.9 s"), (250.7, "0:04:10"), (90_000, "1 day, 1:00:00")]
)
def test_time_that_goes_by(seconds, said):
    assert spell_elapsed(seconds) == said
