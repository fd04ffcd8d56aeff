import time
from io import StringIO

from rich.console import Console

from longvlm.jobs.cluster import progress
from longvlm.jobs.cluster.tally import StageReporter, Tally


def test_bars_show_units_rates_and_what_is_left(monkeypatch):
    monkeypatch.setattr(progress, "POLL_S", 0.05)
    screen = Console(file=StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **_: screen)
    tally = Tally("bars")
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
