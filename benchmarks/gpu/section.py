"""A section: what it is given, and how it is run in a process of its own that ends when its time does.

What a section has found so far comes through a pipe as soon as it is there, so that nothing is lost where it hangs,
dies or leaves the device unusable. The process that starts the others imports no torch and never touches a device.
"""

import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

GRACE_S = 10.0  # for a section that has said its last to leave the device
LOG_LINES = 40  # of what it printed, kept where it failed

Found = dict[str, Any]


class Failure(Exception):  # noqa: N818 - a section's, not a program's
    """A failed check, as a sentence."""


def check(is_so: bool, sentence: str) -> None:  # noqa: FBT001 - as `assert` takes it, but kept under `python -O`
    """Fail the section with a sentence unless something is so."""
    if not is_so:
        raise Failure(sentence)


@dataclass
class Run:
    """The context of a section; `device` is a torch.device."""

    device: Any
    is_tiny: bool  # shapes for a rehearsal
    ends_s: float  # by time.monotonic, when it will be killed
    send: Callable[[tuple[str, Any]], None]
    failures: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Seconds until then."""
        return self.ends_s - time.monotonic()

    def note(self, **found: Any) -> None:
        """Add to the section's result."""
        self.send(("found", finite(found)))

    def say(self, line: str) -> None:
        """A line for people."""
        self.send(("line", line))

    def part(self, name: str, function: Callable[[], Found]) -> Found | None:
        """A part's result, noted under its name; one that fails says so and leaves the others alone."""
        try:
            found = function()
        except Exception as error:  # noqa: BLE001 - whatever it was, the other parts are worth a try
            traceback.print_exc()
            self.failures.append(f"{name}: {describe(error)}")
            self.say(f"{name}: {describe(error)}")
            return None
        self.note(**{name: found})
        return found


@dataclass
class SectionResult:
    """The result of a section."""

    name: str
    found: Found = field(default_factory=dict)
    error: str | None = None
    wall_s: float = 0.0
    log: list[str] = field(default_factory=list)  # the end of what it printed, where it failed

    def as_json(self) -> Found:
        """The section's file."""
        failed = {"error": self.error, "log": self.log} if self.error else {}
        return {"section": self.name, **failed, "wall_s": round(self.wall_s, 1), **self.found}


def run_section(
    context: BaseContext,
    name: str,
    device: str,
    share_s: float,
    *,
    is_tiny: bool,
    on_news: Callable[[SectionResult, str], None],
) -> SectionResult:
    """Run one section in a process of its own; `on_news` is told of each result and line as it comes."""
    outcome, ours, process = SectionResult(name), None, None
    started_s = time.monotonic()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        try:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (name, device, is_tiny, share_s, theirs, str(log))
            process = context.Process(target=_work, args=arguments)  # type: ignore[attr-defined] # all contexts have it
            process.start()  # the first one waits until the libraries are imported
            theirs.close()
            outcome.error = _listen(ours, time.monotonic() + share_s, outcome, on_news)
            process.join(GRACE_S if outcome.error is None else 1.0)
            if outcome.error == _SILENT:
                outcome.error = f"the section's process ended without a word, with exit code {process.exitcode}."
        except (OSError, EOFError) as error:
            outcome.error = f"the section could not be started: {describe(error)}"
        finally:
            if process is not None:
                _end(process)
            if ours is not None:
                ours.close()
            if outcome.error:
                outcome.log = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    outcome.wall_s = time.monotonic() - started_s
    return outcome


_SILENT = "silent"


def _listen(
    ours: Connection, ends_s: float, outcome: SectionResult, on_news: Callable[[SectionResult, str], None]
) -> str | None:
    """Take what a section says until it says how it ended; returns its error."""
    while True:
        left_s = ends_s - time.monotonic()
        if left_s <= 0 or not ours.poll(left_s):
            return "the section was ended when its share of the time was over; what it had found by then is kept."
        try:
            kind, news = ours.recv()
        except EOFError:
            return _SILENT
        if kind == "end":
            error: str | None = news
            return error
        if kind == "found":
            outcome.found |= news
        on_news(outcome, news if kind == "line" else "")


def _end(process: Any) -> None:
    """End a section's process and all that it has started."""
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
        process.join(GRACE_S)


def _work(name: str, device: str, is_tiny: bool, share_s: float, theirs: Connection, log: str) -> None:  # noqa: FBT001
    """Be the process of a section."""
    os.setsid()  # so that it can be ended together with what it starts
    signal.alarm(math.ceil(share_s + GRACE_S))  # nor does it outlive a parent that was killed
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    error: str | None
    try:
        import torch

        run = Run(torch.device(device), is_tiny, time.monotonic() + share_s, theirs.send)
        importlib.import_module(f"benchmarks.gpu.{name}").run(run)
        error = " ".join(run.failures) or None
    except BaseException as raised:  # noqa: BLE001 - all of it is the section's result
        traceback.print_exc()
        error = describe(raised)
    sys.stdout.flush()
    sys.stderr.flush()
    theirs.send(("end", error))


def describe(error: BaseException) -> str:
    """An error in a line."""
    text = next(iter(str(error).strip().splitlines()), "")
    said = text if isinstance(error, Failure | AssertionError) and text else f"{type(error).__name__}: {text}"
    return said if said.endswith(".") else f"{said}."


def finite(value: Any) -> Any:
    """A value as JSON can have it: what is no number is null."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
