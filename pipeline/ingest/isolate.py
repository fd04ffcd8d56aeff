"""Decoding in a child process, so that a decoder can hang, crash or swallow all memory alone.

The child imports no more than numpy and the decoders. It is watched from outside, because a decoder may hang in C with
the interpreter's lock held; and it is told by the kernel's timer to end, should its parent be gone.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from pipeline.ingest import decode
from pipeline.ingest.decode import Decoded, Mode, Resize
from schemas.errors import ErrorCode, PipelineError, TerminalError
from schemas.timeline import VideoInfo

T = TypeVar("T")
_POLL_S = 0.05  # how often memory is looked at: at 4 GB/s the limit may be passed by 200 MB
_VIDEOS_PER_CHILD = 1000  # the decoders' libraries keep some 5 KB of each
_START_S = 120.0  # to start Python and import the decoders on a machine that is busy
_CHILD_ENV = {
    "OPENBLAS_NUM_THREADS": "1",
    # With glibc's own settings the child grows to twice the size and stays there: frames leave holes behind.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
_SERVE = "import sys; from pipeline.ingest.isolate import serve; serve(int(sys.argv[1]), float(sys.argv[2]))"


class Decoder:
    """A child that probes and decodes one video at a time; replaced after each failure that costs its life.

    Args:
        deadline_s: wall seconds that one call may take.
        memory_limit_bytes: resident memory of the whole child, some 80 MB of it for Python and the decoders.
    """

    def __init__(self, deadline_s: float, memory_limit_bytes: int) -> None:
        self.deadline_s = deadline_s
        self.memory_limit_bytes = memory_limit_bytes
        self.cpu_ms = 0.0  # CPU milliseconds spent in calls so far, failed ones too
        self._num_probed = 0  # by the child of now
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None

    def probe(self, path: str, mode: Mode = "exact") -> VideoInfo:
        """See `decode.probe`; further failures as in `call`."""
        if self._num_probed >= _VIDEOS_PER_CHILD:
            self.close()
        info = self.call(decode.probe, path, mode)
        self._num_probed += 1
        return info

    def decode(
        self, path: str, frames: list[int], px: int, mode: Mode = "exact", resize: Resize = "decoder"
    ) -> Decoded:
        """See `decode.decode`; further failures as in `call`."""
        return self.call(decode.decode, path, frames, px, mode, resize)

    def forget(self) -> None:
        """Have the child close the video that it still holds open."""
        if self._child is not None and self._child.poll() is None:
            with suppress(TerminalError):  # a child that dies of it holds nothing any more
                self.call(decode.forget)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run an importable function in the child.

        Raises:
            TerminalError: what the function raised, with DECODE_FAILED for errors without a code; DEADLINE,
                MEMORY_LIMIT or DECODER_CRASHED where the child had to be, or was, ended.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        assert self._child is not None
        assert self._pipe is not None
        self._errors.seek(0)
        self._errors.truncate()
        try:
            self._pipe.send_bytes(pickle.dumps((function, args), protocol=5))
            self._wait(time.monotonic() + self.deadline_s)
            kind, value, cpu_ms = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._crashed() from error
        self.cpu_ms += cpu_ms
        if kind == "error":
            raise value
        return value

    def _start(self) -> None:
        self.close()
        # What libraries print goes here; its end explains a crash.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._pipe, theirs = Pipe()
        ours = str(Path(__file__).parents[2])  # first, so that the child runs the code that its parent runs
        env = {**os.environ, **_CHILD_ENV, "PYTHONPATH": os.pathsep.join(filter(None, [ours, *sys.path]))}
        self._child = subprocess.Popen(  # noqa: S603 - this interpreter, running `serve`
            [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(self.deadline_s)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=env,
        )
        theirs.close()
        self._process = psutil.Process(self._child.pid)
        if not self._pipe.poll(_START_S) or self._pipe.recv() != "ready":
            raise self._crashed()

    def _wait(self, deadline: float) -> None:
        """Until the child answers; ends it when it is past the deadline or the memory limit."""
        assert self._pipe is not None
        while not self._pipe.poll(_POLL_S):
            try:
                used = self._process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # it died just now: the pipe is at its end
            if used > self.memory_limit_bytes:
                limit_mb = self.memory_limit_bytes / 1e6
                raise self._end(
                    ErrorCode.MEMORY_LIMIT, f"Decoding took more than {limit_mb:.0f} MB; raise the limit or transcode."
                )
            if time.monotonic() > deadline:
                raise self._end(
                    ErrorCode.DEADLINE,
                    f"Decoding was not done after {self.deadline_s:.0f} s; raise the deadline or transcode the video.",
                )

    def _end(self, code: ErrorCode, message: str) -> TerminalError:
        spent = self._process.cpu_times()
        self.cpu_ms += (spent.user + spent.system) * 1e3
        self.close()
        return TerminalError(code, message)

    def _crashed(self) -> TerminalError:
        assert self._child is not None
        self._child.kill()  # it may have closed the pipe only
        status = self._child.wait()
        self._errors.seek(0)
        last_line = (self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        self.close()
        return TerminalError(
            ErrorCode.DECODER_CRASHED,
            f"The decoder crashed ({how}{': ' if last_line else ''}{last_line}); transcode the video.",
        )

    def close(self) -> None:
        """End the child; the next call would start another."""
        self._num_probed = 0
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._errors.close()
            self._child = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def serve(descriptor: int, deadline_s: float) -> None:
    """The child: answers calls until its parent closes the pipe."""
    import av

    av.logging.set_level(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its child
    pipe: Connection[Any, Any] = Connection(descriptor)
    pipe.send("ready")
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our parent
        except EOFError:
            return
        # A child whose parent was killed in the middle of a call may hang with nobody left to end it.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + 60)
        started = time.process_time()
        reply = _run(function, args)
        try:
            pipe.send((*reply, (time.process_time() - started) * 1e3))
        except BrokenPipeError:
            return


def _run(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", function(*args)
    except PipelineError as error:
        return "error", error
    except MemoryError:
        return "error", TerminalError(ErrorCode.MEMORY_LIMIT, "Decoding ran out of memory; transcode the video.")
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises costs its video, not the run
        return "error", TerminalError(ErrorCode.DECODE_FAILED, f"Decoding failed: {type(error).__name__}: {error}.")
