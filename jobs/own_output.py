"""Standard output as commands have it: the main thread's own, and what happens where it takes no more."""

import errno
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from longvlm.jobs.cluster.activity import make_room
from longvlm.jobs.options import STOPPED, say


class LostOutputError(Exception):
    """Standard output takes no more: whoever read it has gone, or there is no room."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class OwnOutput:
    r"""Standard output for the main thread alone; what other threads print goes to standard error.

    Ray tells of dead workers from a thread of its own, on standard output, where a machine expects JSON. Characters
    that its encoding lacks are written as `\u65e5`.
    """

    def __init__(self, stdout: TextIO) -> None:
        self._stdout = stdout
        self.buffer = _OwnBytes(self)

    def write(self, text: str) -> int:
        """Write to the stream of the thread that asks."""
        make_room()
        if threading.current_thread() is not threading.main_thread():
            return sys.stderr.write(text)
        try:
            return self._reached(lambda: self._stdout.write(text))
        except UnicodeEncodeError as error:
            escaped = text.encode(error.encoding, "backslashreplace").decode(error.encoding)
            return self._reached(lambda: self._stdout.write(escaped))

    def flush(self) -> None:
        """Hand on what waits."""
        self._reached(self._stdout.flush)

    def _reached(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            raise LostOutputError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


class _OwnBytes(io.BufferedIOBase):
    """What click writes bytes to, and text too where a stream is of ASCII: both go the way of all output."""

    def __init__(self, own: OwnOutput) -> None:
        self._own = own

    def writable(self) -> bool:
        """It is there for that."""
        return True

    def write(self, data: Any) -> int:
        """Write UTF-8."""
        self._own.write(bytes(data).decode())
        return len(data)

    def flush(self) -> None:
        """Hand on what waits."""
        self._own.flush()


@contextmanager
def own_output() -> Iterator[None]:
    """Standard output for a command, the body; where it takes no more, the process ends with 1.

    Quietly, if its reader has had enough (`| head -1`), or else with a sentence.
    """
    if sys.stdout is None:  # it was closed before this process began
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    own = OwnOutput(sys.stdout)
    try:
        with redirect_stdout(own):
            try:
                yield
            finally:
                own.flush()
    except LostOutputError as lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what still waits would be tried at the end
        if lost.reason.errno != errno.EPIPE:
            why = lost.reason.strerror
            say(f"longvlm: standard output cannot be written ({why}); make room, or send it elsewhere.", err=True)
        sys.exit(STOPPED)
