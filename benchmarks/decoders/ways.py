"""The decoders that are compared: each opens a file, decodes the frames of some numbers and makes them small.

PyAV's ways are the project's own, with all that it has to know of a file before it samples (an index of its packets).
decord and torchcodec are asked for the numbers that it found, which flatters them.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.scaling import Size
from longvlm.pipeline.decode.video import Mode, OpenVideo

Pixels = NDArray[np.uint8]  # [F, height, width, 3]
Way = Callable[[Path, list[int], Size], Pixels]
OURS, ALL_PACKETS, DECORD, TORCHCODEC = "PyAV", "PyAV, all packets", "decord", "torchcodec"


def by_pyav(path: Path, wanted: list[int], size: Size, mode: Mode = "exact", *, skips: bool = True) -> Pixels:
    """The project's way; without `skips` it hands every packet of a group to the decoder."""
    video = OpenVideo(str(path), mode)
    try:
        if not skips:
            video.reader._can_skip_packets = False  # noqa: SLF001 - the one place that looks inside
        decoded = video.decode(wanted, size, "decoder")
        return decoded.frames[decoded.places]
    finally:
        video.reader.close()


def by_decord(path: Path, wanted: list[int], size: Size) -> Pixels:
    """decord's, on one thread, made small by itself."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    video = decord.VideoReader(str(path), decord.cpu(0), size[1], size[0], num_threads=1)
    pixels: Pixels = video.get_batch(wanted).asnumpy()
    return pixels


def by_torchcodec(path: Path, wanted: list[int], size: Size) -> Pixels:
    """torchcodec's, on one thread, made small by itself; it looks at every packet first, as exact numbers require."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    resize = Resize(size)
    video: Any = VideoDecoder(str(path), num_ffmpeg_threads=1, transforms=[resize], dimension_order="NHWC")
    pixels: Pixels = video.get_frames_at(wanted).data.numpy()
    return pixels


def by_plain_decoding(path: Path, wanted: list[int], size: Size, mode: Mode) -> Pixels:
    """Frames of plain decoding, from the first on, nothing passed over: what the others are held against.

    Where a number has no frame, the one before stands for it.
    """
    video = OpenVideo(str(path), mode)
    scaler, orientation = video._scaler, video.reader.orientation  # noqa: SLF001
    video.reader.close()
    size = size[::-1] if orientation is not None and orientation.transpose else size
    found: dict[int, Pixels] = {}
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        assert isinstance(stream, av.VideoStream)
        stream.codec_context.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                small = scaler.scale(frame, size)
                found[number] = small if orientation is None else orientation.apply(small)
            if number == wanted[-1]:
                break
    return np.stack([found[max(given for given in found if given <= number)] for number in wanted])


def ways_of(mode: Mode) -> dict[str, Way]:
    """Those that are installed, by name; in keyframe mode for frames that are keyframes."""
    ways: dict[str, Way] = {OURS: partial(by_pyav, mode=mode)}
    if mode == "exact":
        ways[ALL_PACKETS] = partial(by_pyav, skips=False)
    others: dict[str, Way] = {DECORD: by_decord, TORCHCODEC: by_torchcodec}
    return ways | {name: way for name, way in others.items() if find_spec(name)}


def keyframes_of(path: Path, most: int) -> list[int]:
    """The numbers of a file's keyframes, evenly at most so many."""
    video = OpenVideo(str(path), "exact")
    numbers = video.reader.frame_index.keyframes
    video.reader.close()
    chosen: list[int] = np.unique(numbers[np.linspace(0, len(numbers) - 1, most, dtype=int)]).tolist()
    return chosen
