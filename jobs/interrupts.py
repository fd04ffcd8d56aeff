"""Ctrl-C, heard by every command: what it ends with, and how it gets past libraries that do not look for it."""

import os
import signal
import socket
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

CTRL_C = 130  # exit code, as shells have it for SIGINT
_SAID = "longvlm: interrupted.\n"
_PRESS_AGAIN_S = 0.05
_GRACE_S = 2.0  # for a query to end in DuckDB's own way


def is_interrupt(error: BaseException) -> bool:
    """Whether this is what Ctrl-C has become: DuckDB puts an error of its own in its place."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, RuntimeError) and str(error).endswith("Query interrupted")
    )


def leave() -> NoReturn:
    """End this process as Ctrl-C ends a command: in one line, and with 130."""
    sys.stderr.write(_SAID)
    # Python remembers that a text which it ran was interrupted (libraries run some as they are loaded), and would end
    # by the signal in the end. It forgets that with the next text; a tuple's class is made of one.
    namedtuple("Heard", ())  # noqa: PYI024 - no fields, no types
    sys.exit(CTRL_C)


@contextmanager
def pressed_until_heard() -> Iterator[None]:
    """Press Ctrl-C once more where it came at a moment when Python drops what is raised, while the body runs.

    That is so in callbacks and while objects go, of which there are many as libraries are loaded.
    """
    before = sys.unraisablehook

    def press_again(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            main = threading.main_thread().ident
            threading.Timer(_PRESS_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            before(dropped)

    sys.unraisablehook = press_again
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end this process in seconds while the body runs; for commands alone, and such as only read.

    Python tells its main thread, once that is back from a library, and DuckDB may never be back from a query. So a
    thread listens, too.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield  # the signal is nothing to another thread, or to what runs in the background
        return
    heard, told = socket.socketpair()
    told.settimeout(0)  # as Python wants it
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    done = threading.Event()

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGINT and not done.wait(_GRACE_S):
                sys.stderr.write(_SAID)
                sys.stderr.flush()
                os._exit(CTRL_C)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        told.close()  # which ends the listener
        listener.join()
        heard.close()
