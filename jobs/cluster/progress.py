"""A progress bar for each stage of a job while it runs, fed by the tally."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

POLL_S = 0.5


class _Rate(ProgressColumn):
    """Units a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """Nothing until there is something to measure."""
        return Text(f"{task.speed:,.1f} {task.fields['unit']}/s" if task.speed else "")


@contextmanager
def progress(
    tally: Any, expected: Mapping[str, int | None], *, show: bool, units: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A bar for each stage on stderr, with its rate and the time left, fed by the tally while the body runs.

    Args:
        tally: the run's tally.
        expected: per stage, how many units are to come, or None where nobody knows yet.
        show: False draws nothing.
        units: per stage, what it counts; videos where it is left out.
    """
    if not show:
        yield
        return
    texts = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), _Rate())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True))
    done = threading.Event()
    with Progress(*texts, *times, console=Console(stderr=True), transient=True) as bars:
        tasks = {
            stage: bars.add_task(stage, total=total, unit=(units or {}).get(stage, "videos"))
            for stage, total in expected.items()
        }

        def poll() -> None:
            while not done.wait(POLL_S):
                report = tally.report()
                for stage, task in tasks.items():
                    bars.update(task, completed=report.get(stage, {}).get("done", 0))

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield
        finally:
            done.set()
            poller.join()
