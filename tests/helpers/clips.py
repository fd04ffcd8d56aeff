"""Small real video files whose pixels encode the frame number, so that a test can tell which frame it was given.

A frame is a grid of 4 x 4 cells. The top row is red, green, blue, white from left to right, which shows whether the
frame stands upright; the twelve cells below are the bits of the frame number, highest first, white for 1. Cells are
read at their centres, so the number survives lossy coding and any resize down to about 16 pixels.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

GRID = 4
MAX_FRAMES = 1 << GRID * (GRID - 1)
TOP_ROW = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)


def numbered_frame(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """RGB frame [height, width, 3] that shows `number` (below 4096); size is (width, height)."""
    width, height = size
    bits = [(number >> bit) & 1 for bit in reversed(range(GRID * (GRID - 1)))]
    cells = np.empty((GRID, GRID, 3), dtype=np.uint8)
    cells[0] = TOP_ROW
    cells[1:] = (np.array(bits, dtype=np.uint8) * 255).reshape(GRID - 1, GRID, 1)
    rows, columns = np.arange(height) * GRID // height, np.arange(width) * GRID // width
    return np.ascontiguousarray(cells[rows][:, columns])


def _centres(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows = (2 * np.arange(GRID) + 1) * frame.shape[0] // (2 * GRID)
    columns = (2 * np.arange(GRID) + 1) * frame.shape[1] // (2 * GRID)
    return frame[rows][:, columns]


def read_number(frame: NDArray[np.uint8]) -> int:
    """The number that a frame of `numbered_frame` shows."""
    bits = (_centres(frame)[1:].mean(axis=-1) > 127).reshape(-1)
    return int("".join("1" if bit else "0" for bit in bits), 2)


def is_upright(frame: NDArray[np.uint8]) -> bool:
    """Whether the top row reads red, green, blue, white from left to right."""
    distance = np.abs(_centres(frame)[0].astype(int) - TOP_ROW.astype(int))
    return bool((distance < 100).all())


def write_clip(
    path: Path | str,
    num_frames: int = 50,
    *,
    fps: int = 25,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation: int = 0,
    times_s: Sequence[float] | None = None,
    noise: int = 0,
    audio_s: float = 0.0,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip whose frame i shows i; the container follows from the path's extension.

    `size` is (width, height) as shown; `rotation` (degrees counter-clockwise, a multiple of 90) stores the pixels
    turned and a display matrix that undoes it. `times_s` gives each frame's time, for variable frame rates. `noise`
    adds that much pixel noise, so that the file is as heavy as a real one. `audio_s` adds a track of silence;
    with `num_frames=0` the file has audio only.
    """
    assert num_frames <= MAX_FRAMES
    path = Path(path)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        if num_frames:
            stream = container.add_stream(codec, rate=fps, options=_encoder_options(codec, options))
            stored = size[::-1] if rotation % 180 else size
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = *stored, pix_fmt, gop
            if rotation:
                stream.set_display_rotation(rotation)
            if times_s is not None:
                stream.codec_context.time_base = stream.time_base = Fraction(1, 90_000)
        silence = container.add_stream("aac", rate=16_000, layout="mono") if audio_s else None
        for number in range(num_frames):
            pixels = np.rot90(numbered_frame(number, size), -rotation // 90)
            if noise:
                shift = rng.integers(-noise, noise + 1, (*pixels.shape[:2], 1), dtype=np.int16)
                pixels = np.clip(pixels + shift, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = number
            if times_s is not None:
                frame.pts, frame.time_base = round(times_s[number] * 90_000), Fraction(1, 90_000)
            container.mux(stream.encode(frame))
        if num_frames:
            container.mux(stream.encode(None))
        if silence:
            _write_silence(container, silence, audio_s)
    return path


def damage(path: Path, first: int, last: int, byte: bytes | None = None) -> None:
    """Overwrite the packets of frames first to last with noise, or with one byte."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for position, size in places[first : last + 1]:
        content[position : position + size] = rng.bytes(size) if byte is None else byte * size
    path.write_bytes(content)


def _encoder_options(codec: str, options: dict[str, str] | None) -> dict[str, str]:
    quick = {"libx264": {"preset": "ultrafast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
    return {**quick.get(codec, {}), **(options or {})}


def _write_silence(container: av.container.OutputContainer, stream: av.audio.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
