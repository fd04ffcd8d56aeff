"""The protocol between a decoder child and its parent: messages in JSON, and frames or times as bare bytes after them.

Never pickles: a video that takes the child over must not get at the parent by what the child answers. For the same
reason the parent takes nothing on trust, and refuses what no honest child would say.
"""

import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.times import MAX_FRAMES, TimedVideo
from longvlm.pipeline.decode.video import DecodedFrames
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError
from longvlm.schemas.timeline import VideoInfo

LENGTH_BYTES = 4  # in front of each JSON text: its length, little-endian
MAX_JSON_BYTES = 4 << 20
_MAX_TEXT = 1000  # characters of an error
_MAX_FLOAT = 1e18  # none that is measured here comes near
_MAX_NUMBER = 2**31 - 1  # of frames and pixels
_MAX_DURATION_S = 30 * 86400.0  # segments are laid out in the parent: a made-up length must not fill its memory


class InvalidMessageError(Exception):
    """A malformed message, such as no honest child sends."""


def request(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """A call of an importable function, to be sent as it is."""
    return serialise({"module": function.__module__, "function": function.__name__, "args": args})


def read_request(message: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function and arguments of a request."""
    return getattr(import_module(message["module"]), message["function"]), message["args"]


def reply(value: Any, cpu_ms: float) -> tuple[bytes, memoryview]:
    """What a function returned or raised, as two parts to be sent one after the other; the second may be empty."""
    data = memoryview(b"")
    said: dict[str, Any] = {"cpu_ms": cpu_ms}
    if isinstance(value, PipelineError):
        said |= {"code": value.code.value, "error": value.message}
    elif isinstance(value, DecodedFrames):
        data = value.frames.reshape(-1).data
        told = {"shown": value.shown, "decoder": value.decoder, "cpu_because": value.cpu_because}
        said |= {"value": told, "num_bytes": len(data)}
    elif isinstance(value, TimedVideo):
        data = value.times_ns.astype("<i8").data.cast("B")
        said |= {"value": value.facts, "num_bytes": len(data)}
    else:
        said["value"] = value
    return serialise(said), data


def serialise(message: dict[str, Any]) -> bytes:
    """Serialise a message, with its length in front."""
    text = json.dumps(message).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_length(length: bytes | bytearray) -> int:
    """The number of bytes of JSON that follow; InvalidMessageError where that is too much."""
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > MAX_JSON_BYTES:
        raise InvalidMessageError(f"a message of {num_bytes} bytes")
    return num_bytes


def parse(text: bytes | bytearray) -> dict[str, Any]:
    """Parse a message; InvalidMessageError where it is none."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessageError(f"no JSON ({type(error).__name__})") from error
    if not isinstance(message, dict):
        raise InvalidMessageError("no message")
    return message


def check_size(message: dict[str, Any], num_bytes: int) -> None:
    """Raise InvalidMessageError where a reply comes with more or fewer bytes than were asked for."""
    if message.get("num_bytes", 0) != num_bytes:
        raise InvalidMessageError("frames of another size")


def room_for_times(message: dict[str, Any]) -> NDArray[np.int64]:
    """Room for the times that follow a reply, one for each frame that it counts; InvalidMessageError beyond bounds.

    None follow a word that says why there are no frames.
    """
    value = message.get("value")
    if isinstance(value, str):
        return np.empty(0, dtype="<i8")
    num_frames = _whole(value if isinstance(value, dict) else {}, "num_frames")
    if num_frames > MAX_FRAMES:
        raise InvalidMessageError(f"a video of {num_frames} frames")
    return np.empty(num_frames, dtype="<i8")


def read_error(message: dict[str, Any]) -> TerminalError | None:
    """The error that a reply holds, its text cut to one line of at most `_MAX_TEXT` characters."""
    if "error" not in message:
        return None
    if message.get("code") not in list(ErrorCode):
        raise InvalidMessageError("an error without a known code")
    return TerminalError(ErrorCode(message["code"]), one_line(str(message["error"])))


def read_cpu_ms(message: dict[str, Any]) -> float:
    """The CPU milliseconds that a reply reports."""
    return _number(message, "cpu_ms")


def read_video(value: Any, times_ns: NDArray[np.int64]) -> TimedVideo:
    """The facts of a video, each within bounds, and the times of its frames, which ascend within it.

    Raises:
        TerminalError: DECODE_FAILED, the video claims to be too long to be one.
        InvalidMessageError: they are none.
    """
    if not isinstance(value, dict) or set(value) != set(VideoInfo.__dataclass_fields__):
        raise InvalidMessageError("no facts of a video")
    duration_s = _number(value, "duration_s")
    if duration_s > _MAX_DURATION_S:
        raise TerminalError(
            ErrorCode.DECODE_FAILED,
            f"The video claims to last {duration_s / 86400:.0f} days, more than {_MAX_DURATION_S / 86400:.0f}; its "
            "time stamps are damaged, so transcode it.",
        )
    try:
        return TimedVideo(
            num_frames=_whole(value, "num_frames"),
            fps=_number(value, "fps"),
            duration_s=duration_s,
            width=_whole(value, "width"),
            height=_whole(value, "height"),
            codec=_name(value, "codec"),
            decoder=_name(value, "decoder"),
            times_ns=times_ns,
        )
    except ValueError as error:
        raise InvalidMessageError("a video without frames, or with times that no frames have") from error


def read_frame_numbers(value: Any, wanted: list[int]) -> tuple[tuple[int, ...], str, str | None]:
    """The numbers of decoded frames, one for each wanted and in no other order, the decoder, and why no GPU was it."""
    numbers = value.get("shown") if isinstance(value, dict) else None
    if not isinstance(numbers, list) or len(numbers) != len(wanted):
        raise InvalidMessageError("not the frames that were asked for")
    if any(type(number) is not int or not 0 <= number <= _MAX_NUMBER for number in numbers):
        raise InvalidMessageError("numbers of no frames")
    steps = zip(wanted, wanted[1:], numbers, numbers[1:], strict=False)
    if any(before <= after and first > second for before, after, first, second in steps):
        raise InvalidMessageError("frames out of order")
    why = None if value.get("cpu_because") is None else _name(value, "cpu_because")
    return tuple(numbers), _name(value, "decoder"), why


def read_ranges(value: Any) -> list[tuple[int, int]]:
    """Pairs of whole numbers; whether they are ranges of a file, whoever knows the file has to see."""
    if not isinstance(value, list) or any(
        not isinstance(pair, list) or len(pair) != 2 or any(type(number) is not int for number in pair)
        for pair in value
    ):
        raise InvalidMessageError("no ranges")
    return [(start, end) for start, end in value]


def one_line(text: str) -> str:
    """A text that may stand in a table and in a log: nothing but printable characters, and not too many."""
    return "".join(char if char.isprintable() else " " for char in text[:_MAX_TEXT])


def _number(message: dict[str, Any], name: str) -> float:
    value = message.get(name)
    if not isinstance(value, int | float) or not 0 <= value <= _MAX_FLOAT:
        raise InvalidMessageError(f"{name} is no number")
    return float(value)


def _whole(message: dict[str, Any], name: str) -> int:
    if type(message.get(name)) is not int or not 0 <= message[name] <= _MAX_NUMBER:
        raise InvalidMessageError(f"{name} is no number")
    return int(message[name])


def _name(message: dict[str, Any], name: str) -> str:
    return one_line(str(message.get(name)))[:100]
