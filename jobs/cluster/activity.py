"""What a command is doing now, told on stderr: a line that moves on a terminal, a line for each step elsewhere.

Nothing heavy is imported here, so that the first line is out before torch, Ray, DuckDB or a bucket is touched.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TextIO

from longvlm.pipeline.visible import visible

_REDRAW_S = 0.1
_ERASE = "\r\x1b[2K"


class _Activity:
    """The activity of one command, on the stream that people look at."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._started_s = stream, time.monotonic()
        self._step: tuple[str, float] | None = None  # what is being done, and since when
        self._moves = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)
        if self._moves:
            self._painter.start()

    def begin(self, what: str) -> None:
        """A step begins, and the one before it has ended."""
        with self._lock:
            self._step = visible(what), time.monotonic()
            if self._moves:
                self._draw()
            else:
                self._write(f"longvlm: {spell_elapsed(time.monotonic() - self._started_s):>7}  {visible(what)}\n")

    def erase(self) -> None:
        """Make room for what others write; nothing is drawn until the next step begins."""
        with self._lock:
            if self._moves and self._step:
                self._write(_ERASE)
            self._step = None

    def close(self) -> None:
        """The command has ended."""
        self._closed.set()
        if self._moves:
            self._painter.join()
        self.erase()

    def _paint(self) -> None:
        while not self._closed.wait(_REDRAW_S):
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        if self._step is None:
            return
        what, since_s = self._step
        took = spell_elapsed(time.monotonic() - since_s)
        with suppress(OSError, ValueError):  # a stream without a size
            if columns := os.get_terminal_size(self._stream.fileno()).columns:
                what = what[: max(columns - len(took) - 5, 8)]
        self._write(f"{_ERASE}{what} ... {took}\r")  # what others write begins at the left, and on top of it

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody looks any more
            self._stream.write(text)
            self._stream.flush()


_activity: _Activity | None = None  # of the command that this process runs


@contextmanager
def shown(*, show: bool) -> Iterator[None]:
    """Let `doing` be seen while the body runs; without `show` nothing is, and so it is where no command runs."""
    global _activity  # noqa: PLW0603 - a process has one terminal
    before, _activity = _activity, _Activity(sys.stderr) if show else None
    try:
        yield
    finally:
        if _activity is not None:
            _activity.close()
        _activity = before


def is_shown() -> bool:
    """Whether a person looks at what a command does: bars are then to be drawn, too."""
    return _activity is not None


def doing(what: str) -> None:
    """Say what is being done from now on: `listing s3://bucket/videos`."""
    if _activity is not None:
        _activity.begin(what)


def make_room() -> None:
    """Take the moving line away, before anything else is written where it is."""
    if _activity is not None:
        _activity.erase()


def spell_elapsed(seconds: float) -> str:
    """A time that goes by: 12.3 s, 0:04:10."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=int(seconds)))
