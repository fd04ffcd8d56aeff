"""How far a job is: bars on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

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
    track,
)
from rich.text import Text

from longvlm.jobs.cluster.activity import doing, make_room, spell_elapsed

POLL_S = 0.5
_LINE_S, _MOST_LINE_S = 5.0, 60.0  # between lines: a tenth of the time so far, within these

T = TypeVar("T")


class Counter(Protocol):
    """What is asked how far a job is: a tally, or what stands for one."""

    def begun_s(self) -> float | None:
        """When the first work began, in seconds since the epoch; None before."""

    def report(self) -> Mapping[str, Mapping[str, float]]:
        """Per stage `done`, the units that are."""


class _Rate(ProgressColumn):
    """Units a second, over the last half minute."""

    def render(self, task: Task) -> Text:
        """Nothing until there is something to measure."""
        return Text(f"{task.speed:,.1f} {task.fields['unit']}/s" if task.speed else "")


@contextmanager
def progress(
    tally: Counter, expected: Mapping[str, int | None], *, show: bool, units: Mapping[str, str] | None = None
) -> Iterator[None]:
    """How far each stage is, on stderr, while the body runs: a bar with its rate and the time left, or lines.

    Args:
        tally: the run's tally.
        expected: per stage, how many units are to come, or None where nobody knows yet.
        show: False shows nothing.
        units: per stage, what it counts; videos where it is left out.
    """
    if not show:
        yield
        return
    doing("starting workers, loading the model")
    done = threading.Event()
    counted = {stage: (units or {}).get(stage, "videos") for stage in expected}

    def watch() -> None:
        while tally.begun_s() is None:
            if done.wait(POLL_S):
                return
        make_room()
        if Console(stderr=True).is_terminal:
            _draw_bars(tally, expected, counted, done)
        else:
            _write_lines(tally, expected, counted, done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _draw_bars(
    tally: Counter, expected: Mapping[str, int | None], units: Mapping[str, str], done: threading.Event
) -> None:
    texts = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), _Rate())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(compact=True))
    with Progress(*texts, *times, console=Console(stderr=True), transient=True) as bars:
        tasks = {stage: bars.add_task(stage, total=total, unit=units[stage]) for stage, total in expected.items()}
        while not done.wait(POLL_S):
            report = tally.report()
            for stage, task in tasks.items():
                bars.update(task, completed=report.get(stage, {}).get("done", 0))


def _write_lines(
    tally: Counter, expected: Mapping[str, int | None], units: Mapping[str, str], done: threading.Event
) -> None:
    began_s, told = time.monotonic(), ""
    while not done.wait(min(max(_LINE_S, (time.monotonic() - began_s) / 10), _MOST_LINE_S)):
        report = tally.report()
        far = [(stage, int(report.get(stage, {}).get("done", 0)), total) for stage, total in expected.items()]
        said = ", ".join(
            f"{stage} {number:,}" + (f" of {total:,} {units[stage]}" if total else "") for stage, number, total in far
        )
        if said != told:  # else there is nothing new to read
            sys.stderr.write(f"longvlm: {spell_elapsed(time.monotonic() - began_s):>7}  {said}\n")
        told = said


def shown_work(work: Iterable[T], what: str, total: int, *, show: bool) -> Iterable[T]:
    """Some work of this process, with a bar on stderr as it is taken; elsewhere than on a terminal a line says what."""
    if show:
        doing(what)
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        return work
    make_room()
    return track(work, what, total, console=console, transient=True)
