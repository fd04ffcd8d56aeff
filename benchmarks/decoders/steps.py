"""What a frame passes through from its file to its tower, step by step, in CPU milliseconds of a frame that is shown.

By the index job's own functions, in this process. A keyframe may be shown in many places; it passes once.
"""

import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from longvlm.jobs.cluster.session import connect
from longvlm.pipeline.decode import messages, units
from longvlm.pipeline.decode.copy import VideoCopy
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.scaling import Size
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.pipeline.decode.video import DecodedFrames, Mode, OpenVideo, Resize, size_out
from longvlm.pipeline.vision.blobs import as_tensor, buffers
from longvlm.pipeline.vision.pictures import distinct_numbers, still_frames
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.schemas.recipe import IndexRecipe

_HALF = Normalisation(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_AT_ONCE = 8  # frames that a tower takes on a CPU


class Spent(defaultdict[str, float]):
    """CPU seconds of this process by step; what belongs to a step within another one counts for that alone."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def on(self, step: str) -> Iterator[None]:
        """Count what the body takes, all threads of it."""
        started_s, before_s = time.process_time(), sum(self.values())
        yield
        self[step] += time.process_time() - started_s - (sum(self.values()) - before_s)

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are counted."""

        def run(*args: Any) -> Any:
            with self.on(step):
                return function(*args)

        return run


class DecoderHere(Decoder):
    """A decoder without a child, whose steps are counted; frames cross a socket as they do from a child."""

    def __init__(self, spent: Spent) -> None:
        super().__init__(deadline_s=300.0, memory_limit_bytes=4 << 30)
        self._spent = spent
        self._video: OpenVideo | None = None

    def probe(
        self, path: str, mode: Mode = "exact", max_gap_s: float | None = None, *, is_sparse: bool = False
    ) -> TimedVideo:
        """See `Decoder.probe`."""
        with self._spent.on("open"):
            self._video = OpenVideo(path, mode, max_gap_s, is_sparse=is_sparse)
        scaler = self._video._scaler  # noqa: SLF001 - the one place that looks inside
        for name in ("scale", "rgb"):
            setattr(scaler, name, self._spent.timed("make small", getattr(scaler, name)))
        self.probed = (path, is_sparse)
        return self._video.info

    def decode(
        self,
        path: str,  # noqa: ARG002 - as of `Decoder`
        frames: list[int],
        size: Size,
        mode: Mode = "exact",  # noqa: ARG002
        resize: Resize = "decoder",
    ) -> DecodedFrames:
        """See `Decoder.decode`."""
        assert self._video is not None
        with self._spent.on("decode"):
            decoded = self._video.decode(frames, size_out(size, resize), resize)
        with self._spent.on("to the worker"):
            return replace(decoded, frames=_crossed(decoded))

    def close_video(self) -> None:
        """See `Decoder.close_video`."""
        if self._video is not None:
            self._video.reader.close()


def _crossed(decoded: DecodedFrames) -> Any:
    """The pixels as they arrive at the other end of a socket."""
    ours, theirs = socket.socketpair()
    header, pixels = messages.reply(decoded, 0.0)
    arrived = decoded.frames.copy()

    def send() -> None:
        theirs.sendall(header)
        theirs.sendall(pixels)

    sender = threading.Thread(target=send)
    sender.start()
    with ours, theirs:
        ours.recv(len(header), socket.MSG_WAITALL)
        view = arrived.reshape(-1).data
        while view:
            view = view[ours.recv_into(view) :]
        sender.join()
    return arrived


def measure(paths: list[Path], recipe: IndexRecipe, rounds: int) -> dict[str, float]:
    """Of all files and rounds the CPU milliseconds by step, and how many frames are shown and how many passed on."""
    connect("local")
    spent, count = Spent(), Counter[str]()
    make_thumbnail, units.thumbnail = units.thumbnail, spent.timed("thumbnails", units.thumbnail)
    try:
        _take_through(paths[0], recipe, spent, count)  # loads what is loaded once
        spent.clear()
        count.clear()
        for path in paths * rounds:
            _take_through(path, recipe, spent, count)
    finally:
        units.thumbnail = make_thumbnail
    found = {step: 1e3 * seconds / count["shown"] for step, seconds in spent.items()}
    return {**found, "sum": sum(found.values()), **{name: number / rounds for name, number in count.items()}}


def _take_through(path: Path, recipe: IndexRecipe, spent: Spent, count: Counter[str]) -> None:
    """One file, a unit at a time."""
    video = {"video_id": path.name, "write_id": path.name, "uri": str(path)}
    decoder = DecoderHere(spent)
    rows = units.decode_units(VideoCopy(video, str(path)), recipe, decoder, has_thumbnails=True)
    while True:
        with spent.on("Arrow"):
            table = next(rows, None)
        if table is None:
            return
        with spent.on("object store"):
            table = ray.get(ray.put(table))
        (unit,) = table.drop_columns(["frames"]).to_pylist()
        if unit["error_code"]:
            raise RuntimeError(f"{path}: {unit['error']}")
        numbers = distinct_numbers(unit["segments"])
        (blob,) = buffers(table["frames"])
        shape = (len(numbers), unit["frame_height"], unit["frame_width"], 3)
        with spent.on("compare"):
            frames = as_tensor(blob, pa.uint8(), shape)
            still_frames(numbers, frames)
        with spent.on("normalise"):
            for start in range(0, len(frames), _AT_ONCE):
                _HALF.apply(frames[start : start + _AT_ONCE], torch.device("cpu"), torch.float32)
        count["shown"] += sum(len(segment["frames"]) for segment in unit["segments"])
        count["passed_on"] += len(numbers)
