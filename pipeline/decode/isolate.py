"""Decoding in a sandboxed child process, so that a decoder can hang, crash, swallow all memory or be taken over alone.

The child imports no more than numpy and the decoders, gives up its rights (`confine`) before it opens a video, and has
none of the credentials that may stand in its parent's environment. It is watched from outside, because a decoder may
hang in C with the interpreter's lock held; and it is told by the kernel's timer to end, should its parent be gone.
"""

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.confine import confine, isolated_python, safe_environment
from longvlm.pipeline.decode import messages, survey, video
from longvlm.pipeline.decode.device import Device
from longvlm.pipeline.decode.scaling import Size
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.pipeline.decode.video import DecodedFrames, Mode, Resize, size_out
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError

T = TypeVar("T")
Room = Callable[[dict[str, Any]], memoryview]  # for the bytes that come with a message
_POLL_S = 0.05  # how often memory is looked at: at 4 GB/s the limit may be passed by 200 MB
_VIDEOS_PER_CHILD = 1000  # the decoders' libraries keep some 5 KB of each
_START_S = 120.0  # to start Python and import the decoders on a machine that is busy
_STDERR_TAIL_BYTES = 4096  # of what libraries print
_CHILD_ENV = {
    "OPENBLAS_NUM_THREADS": "1",
    # With glibc's own settings the child grows to twice the size and stays there: frames leave holes behind.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
_SERVE = "from longvlm.pipeline.decode.isolate import serve; serve(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])"
_DEVICE_FILES = "nvidia*"  # in /dev: through which a program talks to its GPU
_DEVICE_ENV = ("CUDA_VISIBLE_DEVICES",)  # which one a worker was given


class Decoder:
    """A decoder in a child process, for one video at a time; the child is replaced after each failure that ends it.

    Args:
        deadline_s: wall seconds that one call may take.
        memory_limit_bytes: resident memory of the whole child, some 80 MB of it for Python and the decoders.
        device: "cuda" decodes on a GPU what that can, see `device`.
    """

    def __init__(self, deadline_s: float, memory_limit_bytes: int, device: Device = "cpu") -> None:
        self.deadline_s = deadline_s
        self.memory_limit_bytes = memory_limit_bytes
        self.device = device
        self.cpu_ms = 0.0  # CPU milliseconds spent in calls so far, failed ones too
        self._num_probed = 0  # by the child of now
        self.probed: tuple[str, bool] | None = None  # the video that the child holds open, and whether it is sparse
        self.confined: tuple[str, ...] = ()  # what holds in the child of now, see `confine`
        self._in_call = threading.Lock()  # threads take turns
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def probe(
        self, path: str, mode: Mode = "exact", max_gap_s: float | None = None, *, is_sparse: bool = False
    ) -> TimedVideo:
        """See `video.probe`; further failures as in `call`."""
        self.probed = None
        value, times_ns = self._call_for_times(video.probe, (path, mode, max_gap_s, is_sparse))
        info = self._checked(lambda: messages.read_video(value, times_ns))
        self.probed = (path, is_sparse)
        return info

    def survey(self, path: str, mode: Mode, max_gap_s: float | None) -> TimedVideo | str:
        """See `survey.survey`; further failures as in `call`."""
        value, times_ns = self._call_for_times(survey.survey, (path, mode, max_gap_s))
        if isinstance(value, str):
            return messages.one_line(value)
        return self._checked(lambda: messages.read_video(value, times_ns))

    def missing_ranges(self, path: str, frames: list[int], have: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """See `survey.missing_ranges`; they are not checked. Further failures as in `call`."""
        value = self.call(survey.missing_ranges, path, frames, have)
        return self._checked(lambda: messages.read_ranges(value))

    def _call_for_times(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, NDArray[np.int64]]:
        """What a function says of a video, and the times of its frames."""
        if self._num_probed >= _VIDEOS_PER_CHILD:
            self.close()
        times_ns = np.empty(0, dtype=np.int64)

        def room(message: dict[str, Any]) -> memoryview:
            nonlocal times_ns
            times_ns = messages.room_for_times(message)
            return times_ns.data.cast("B")

        value = self._call_into(function, args, room)
        self._num_probed += 1
        return value, times_ns

    def decode(
        self, path: str, frames: list[int], size: Size, mode: Mode = "exact", resize: Resize = "decoder"
    ) -> DecodedFrames:
        """See `video.decode`; further failures as in `call`."""
        pixels = np.empty((0, 0, 0, 3), dtype=np.uint8)

        def room(message: dict[str, Any]) -> memoryview:
            nonlocal pixels
            shown, *_ = messages.read_frame_numbers(message.get("value"), frames)
            pixels = np.empty((len(set(shown)), *size_out(size, resize), 3), dtype=np.uint8)
            return pixels.reshape(-1).data

        value = self._call_into(video.decode, (path, frames, size, mode, resize), room)
        return DecodedFrames(pixels, *messages.read_frame_numbers(value, frames))

    def can_seek(self) -> bool:
        """See `video.can_seek`; further failures as in `call`."""
        return self.call(video.can_seek) is True

    def close_video(self) -> None:
        """Have the child close the video that it still holds open."""
        self.probed = None
        if self._child is not None and self._child.poll() is None:
            with suppress(TerminalError):  # a child that dies of it holds nothing any more
                self.call(video.close_video)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run an importable function in the child; arguments and result are what JSON can say.

        Raises:
            TerminalError: what the function raised, with DECODE_FAILED for errors without a code; DEADLINE,
                MEMORY_LIMIT or DECODER_CRASHED where the child had to be, or was, ended.
        """
        return self._call_into(function, args, _no_room)

    def _call_into(self, function: Callable[..., Any], args: tuple[Any, ...], room: Room) -> Any:
        """The value that a function returns; the bytes that come with it fill the room that there is for them."""
        with self._in_call:
            return self._answer(function, args, room)

    def _answer(self, function: Callable[..., Any], args: tuple[Any, ...], room: Room) -> Any:
        if self._child is None or self._child.poll() is not None:
            self._start()
        assert self._socket is not None
        self._errors.seek(0)
        self._errors.truncate()
        try:
            self._socket.settimeout(self.deadline_s)
            self._socket.sendall(messages.request(function, args))
        except TimeoutError as error:
            raise self._deadline_error(self.deadline_s) from error
        except OSError as error:
            raise self._crash_error() from error
        message = self._message(self.deadline_s, room)
        self.cpu_ms += self._checked(lambda: messages.read_cpu_ms(message))
        if failure := self._checked(lambda: messages.read_error(message)):
            raise failure
        return message.get("value")

    def _checked(self, check: Callable[[], T]) -> T:
        """The result of checking a reply; a child that sends a malformed one is ended."""
        try:
            return check()
        except messages.InvalidMessageError as error:
            raise self._kill(
                ErrorCode.DECODER_CRASHED, f"The decoder's reply is malformed ({error}); transcode the video."
            ) from error

    def _start(self) -> None:
        import psutil  # not above: the child, which imports this file, does without

        self.close()
        # What libraries print goes here; its end explains a crash.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._socket, theirs = socket.socketpair()
        kept = _DEVICE_ENV if self.device == "cuda" else ()
        self._child = subprocess.Popen(  # noqa: S603 - this interpreter, running `serve`
            isolated_python(_SERVE, str(theirs.fileno()), str(self.deadline_s), self.device),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=safe_environment() | _CHILD_ENV | {name: os.environ[name] for name in kept if name in os.environ},
            start_new_session=True,  # without our terminal, into which keystrokes could be put
        )
        theirs.close()
        self._process = psutil.Process(self._child.pid)
        self.confined = tuple(self._message(_START_S, _no_room)["value"])  # no video was opened yet

    def _message(self, limit_s: float, room: Room) -> dict[str, Any]:
        """The child's next message, which must come, whole, within `limit_s`; the bytes after it go to its room."""
        deadline = time.monotonic() + limit_s
        try:
            length = self._receive(bytearray(messages.LENGTH_BYTES), deadline, limit_s)
            num_bytes = self._checked(lambda: messages.read_length(length))
            text = self._receive(bytearray(num_bytes), deadline, limit_s)
            message = self._checked(lambda: messages.parse(text))
            if "error" not in message:
                into = self._checked(lambda: room(message))
                self._checked(lambda: messages.check_size(message, len(into)))
                self._receive(into, deadline, limit_s)
        except (EOFError, OSError) as error:
            raise self._crash_error() from error
        return message

    def _receive(self, buffer: Any, deadline: float, limit_s: float) -> Any:
        """Fill a buffer; ends the child when it is past the deadline or the memory limit."""
        assert self._socket is not None
        self._socket.settimeout(_POLL_S)
        view, looked = memoryview(buffer), time.monotonic()
        while view:
            try:
                received = self._socket.recv_into(view)
                if not received:
                    raise EOFError
                view = view[received:]
            except TimeoutError:
                pass
            if (now := time.monotonic()) - looked >= _POLL_S:
                looked = now
                self._check_memory()
                if now > deadline:
                    raise self._deadline_error(limit_s)
        return buffer

    def _check_memory(self) -> None:
        import psutil

        try:
            used = self._process.memory_info().rss
        except psutil.NoSuchProcess:
            return  # it died just now: the socket is at its end
        if used > self.memory_limit_bytes:
            limit_mb = self.memory_limit_bytes / 1e6
            raise self._kill(
                ErrorCode.MEMORY_LIMIT, f"Decoding took more than {limit_mb:.0f} MB; raise the limit or transcode."
            )

    def _deadline_error(self, limit_s: float) -> TerminalError:
        return self._kill(
            ErrorCode.DEADLINE,
            f"Decoding was not done after {limit_s:.0f} s; raise the deadline or transcode the video.",
        )

    def _kill(self, code: ErrorCode, message: str) -> TerminalError:
        spent = self._process.cpu_times()
        self.cpu_ms += (spent.user + spent.system) * 1e3
        self.close()
        return TerminalError(code, message)

    def _crash_error(self) -> TerminalError:
        assert self._child is not None
        self._child.kill()  # it may have closed the pipe only
        status = self._child.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _STDERR_TAIL_BYTES))
        words = self._errors.read(_STDERR_TAIL_BYTES).decode(errors="replace").strip().splitlines()
        last_line = messages.one_line(words[-1]) if words else ""
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        self.close()
        return TerminalError(
            ErrorCode.DECODER_CRASHED,
            f"The decoder crashed ({how}{': ' if last_line else ''}{last_line}); transcode the video.",
        )

    def close(self) -> None:
        """End the child process; the next call would start another."""
        self._num_probed, self.probed = 0, None
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._errors.close()
            self._child = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _no_room(_: dict[str, Any]) -> memoryview:
    """The room for what comes alone."""
    return memoryview(b"")


def serve(descriptor: int, deadline_s: float, device: str) -> None:
    """The child's main loop: answer calls until the parent closes the socket."""
    import av

    av.logging.set_level(None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its child
    parent = socket.socket(fileno=descriptor)
    requests = parent.makefile("rb")
    devices = [str(path) for path in Path("/dev").glob(_DEVICE_FILES)] if device == "cuda" else []
    parent.sendall(messages.serialise({"value": confine(devices)}))
    if device == "cuda":  # only now, for threads that there are before are not confined
        video.use_device()
    while length := requests.read(messages.LENGTH_BYTES):
        function, args = messages.read_request(messages.parse(requests.read(messages.read_length(length))))
        # A child whose parent was killed in the middle of a call may hang with nobody left to end it.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + 60)
        started = time.process_time()
        value = _run(function, args)
        header, frames = messages.reply(value, (time.process_time() - started) * 1e3)
        try:
            parent.sendall(header)
            parent.sendall(frames)
        except BrokenPipeError:
            return


def _run(function: Callable[..., Any], args: list[Any]) -> Any:
    """What the function returns, or the error that it raises."""
    import av

    try:
        return function(*args)
    except PipelineError as error:
        return error
    except MemoryError:
        return TerminalError(ErrorCode.MEMORY_LIMIT, "Decoding ran out of memory; transcode the video.")
    except av.FFmpegError as error:
        return TerminalError(ErrorCode.DECODE_FAILED, f"FFmpeg cannot read the video ({error.strerror}); transcode it.")
    except Exception as error:  # noqa: BLE001 - whatever a decoder raises costs its video, not the run
        return TerminalError(ErrorCode.DECODE_FAILED, f"Decoding failed: {type(error).__name__}: {error}.")
