"""Small real video files whose pixels encode the frame number, so that a test can tell which frame it was given.

A frame is a grid of 4 x 4 cells. The top row is red, green, blue, white from left to right, which shows whether the
frame stands upright; the twelve cells below are the bits of the frame number, highest first, white for 1. Cells are
read at their centres, so the number survives lossy coding and any resize down to about 16 pixels.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    return cells[:, columns][rows]  # in this order rows are copied whole


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
    times_s: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    **looks: Any,
) -> Path:
    """Write a clip whose frame i shows i; the container follows from the path's extension. See `_clip`.

    `times_s` gives each frame's time, for variable frame rates.
    """
    path = Path(path)
    times = None if times_s is None else tuple(times_s)
    path.write_bytes(_clip(path.suffix, num_frames, times, tuple((options or {}).items()), **looks))
    return path


@lru_cache(100)  # tests ask for the same clips again and again, and to encode one takes longer than most tests
def _clip(
    suffix: str,
    num_frames: int,
    times_s: tuple[float, ...] | None,
    options: tuple[tuple[str, str], ...],
    *,
    fps: int = 25,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation: int = 0,
    pixel_aspect: Fraction = Fraction(1),
    noise: int = 0,
    audio_s: float = 0.0,
) -> bytes:
    """The bytes of a clip.

    `size` is (width, height) as shown; `rotation` (degrees counter-clockwise, a multiple of 90) stores the pixels
    turned and a display matrix that undoes it. `pixel_aspect` says how wide stored pixels are to be shown. `noise` adds
    that much pixel noise, so that the file is as heavy as a real one. `audio_s` adds a track of silence; with
    `num_frames=0` the file has audio only.
    """
    assert num_frames <= MAX_FRAMES
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        path = Path(folder, f"clip{suffix}")
        with av.open(str(path), "w") as container:
            if num_frames:
                stream = container.add_stream(codec, rate=fps, options=_encoder_options(codec, dict(options) or None))
                stored = size[::-1] if rotation % 180 else size
                stream.width, stream.height, stream.pix_fmt, stream.gop_size = *stored, pix_fmt, gop
                stream.codec_context.sample_aspect_ratio = pixel_aspect
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
        return path.read_bytes()


def write_still(path: Path | str, num_frames: int, size: tuple[int, int], *, fps: int = 25, gop: int = 50) -> Path:
    """Write a large clip at little cost: all its frames are the same picture. `size` is (width, height)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", gop
        frame = av.VideoFrame.from_ndarray(numbered_frame(0, size), format="rgb24").reformat(format="yuv420p")
        for frame.pts in range(num_frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)


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
    quick = {
        "libx264": {"preset": "ultrafast", "threads": "1"},  # more of them cost more, and make other bytes
        "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    }
    return {**quick.get(codec, {}), **(options or {})}


def _write_silence(container: av.container.OutputContainer, stream: av.audio.AudioStream, seconds: float) -> None:
    for start in range(0, int(seconds * 16_000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, start, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


# --- files of the kinds that people report trouble with: cut without decoding, restamped, turned, interlaced ---


def remux(
    source: Path, target: Path, change: Callable[[int, av.Packet], bool] = lambda *_: True, **options: str
) -> Path:
    """Copy the packets of a clip's video into another container; `change` alters each, or says false to leave it out.

    Stamps are told in the source's time base.
    """
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size and change(number, packet):
                packet.stream = stream
                new.mux(packet)
    return target


def cut(source: Path, target: Path, start: int) -> Path:
    """A lossless cut of a clip from a tick on, as of `ffmpeg -ss T -c copy`: an edit list hides what is before."""

    def shift(_: int, packet: av.Packet) -> bool:
        packet.pts, packet.dts = packet.pts - start, packet.dts - start
        return True

    return remux(source, target, shift, avoid_negative_ts="disabled", use_editlist="1")


def with_matrix(source: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A copy of an MP4 with another display matrix: the numbers a, b, c, d of it, in units of 1."""
    content = bytearray(source.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of times, layer and volume come before
    a, b, c, d = (number << 16 for number in matrix)
    numbers = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30 if any(matrix) else 0], dtype=">i4")
    content[place : place + 36] = numbers.tobytes()
    target.write_bytes(content)
    return target


def stored_as(number: int, size: tuple[int, int], matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The pixels [H, W, 3] to store so that a player, by the display matrix, shows the frame `number` of a size."""
    a, b, c, d = matrix
    shown = numbered_frame(number, size)
    if b or c:
        return np.ascontiguousarray(shown[:: b or 1, :: c or 1].swapaxes(0, 1))
    return np.ascontiguousarray(shown[:: d or 1, :: a or 1])


def write_oriented(path: Path, matrix: tuple[int, int, int, int], num_frames: int = 12) -> Path:
    """An MP4 of upright frames of 96 x 64 pixels, stored as its display matrix wants them."""
    plain = path.with_suffix(".plain.mp4")
    with av.open(str(plain), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        first = stored_as(0, (96, 64), matrix)
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt, stream.gop_size = "yuv420p", 4
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(stored_as(number, (96, 64), matrix), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return with_matrix(plain, path, matrix)


class _Bits:
    """A writer of bits, with the codes of H.264 (ITU-T H.264, section 9.1)."""

    def __init__(self) -> None:
        self.text = ""

    def put(self, value: int, width: int) -> None:
        self.text += format(value, f"0{width}b")

    def ue(self, value: int) -> None:
        self.put(value + 1, 2 * (value + 1).bit_length() - 1)

    def unit(self, kind: int) -> bytes:
        """A NAL unit of a kind, closed and with its start code."""
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        raw = int(text, 2).to_bytes(len(text) // 8, "big")
        escaped, zeros = bytearray(), 0
        for byte in raw:
            if zeros == 2 and byte <= 3:
                escaped.append(3)
                zeros = 0
            escaped.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([0x60 | kind]) + bytes(escaped)


def field_pictures(num_frames: int, fields: Callable[[int], bool] = lambda _: True) -> list[list[bytes]]:
    """H.264 of 32 x 32 pixels without compression: for each frame its pictures, two fields or the whole frame.

    All frames are keyframes; frame i is of the grey 16 + 8 i.
    """
    sps, pps = _Bits(), _Bits()
    sps.put(77, 8), sps.put(0, 8), sps.put(30, 8)  # main profile, level 3
    for value in (0, 0, 2, 1):  # id, 4 bits of frame_num, no order but that of decoding, one reference
        sps.ue(value)
    sps.put(0, 1)
    sps.ue(1), sps.ue(0)  # 2 macroblocks wide, 2 high: one for each field
    sps.put(0, 1), sps.put(0, 1), sps.put(1, 1)  # frames may be fields; no MBAFF; direct 8x8
    sps.put(0, 1), sps.put(0, 1)
    pps.ue(0), pps.ue(0), pps.put(0, 1), pps.put(0, 1), pps.ue(0), pps.ue(0), pps.ue(0), pps.put(0, 3)
    pps.ue(0), pps.ue(0), pps.ue(0), pps.put(0, 3)
    head = sps.unit(7) + pps.unit(8)
    result = []
    for number in range(num_frames):
        as_fields = fields(number)
        pictures = [_picture(number, bottom) for bottom in (0, 1)] if as_fields else [_picture(number, None)]
        result.append([head + pictures[0], *pictures[1:]])
    return result


def _picture(number: int, bottom: int | None) -> bytes:
    """An intra picture of one grey: a field, or with `bottom` None a frame."""
    bits = _Bits()
    bits.ue(0), bits.ue(7), bits.ue(0)  # from the first macroblock, all intra, of that PPS
    bits.put(0, 4)  # frame_num
    bits.put(int(bottom is not None), 1)
    if bottom is not None:
        bits.put(bottom, 1)
    if bottom != 1:  # the second field of an IDR picture is none itself
        bits.ue(number % 2)  # idr_pic_id
        bits.put(0, 2)
    else:
        bits.put(0, 1)
    bits.ue(0)  # slice_qp_delta (0 as a signed code)
    for _ in range(2 if bottom is not None else 4):
        bits.ue(25)  # I_PCM
        bits.text += "0" * (-len(bits.text) % 8)  # the byte of the NAL's head is whole, so bytes align
        for value, count in ((16 + 8 * number, 256), (128, 128)):
            bits.text += format(value, "08b") * count
    return bits.unit(5 if bottom != 1 else 1)


def write_fields(path: Path, num_frames: int, fields: Callable[[int], bool] = lambda _: True) -> Path:
    """A clip at 25 fps of the frames of `field_pictures`, each picture in a packet of its own."""
    pictures = field_pictures(num_frames, fields)
    raw = path if path.suffix == ".h264" else path.with_suffix(".raw.h264")
    raw.write_bytes(b"".join(part for parts in pictures for part in parts))
    if raw == path:
        return path
    ticks = [3600 * number + 1800 * place for number, parts in enumerate(pictures) for place in range(len(parts))]

    def stamp(number: int, packet: av.Packet) -> bool:
        packet.time_base = Fraction(1, 90_000)
        packet.pts = packet.dts = ticks[number]
        packet.duration = 1800
        return True

    return remux(raw, path, stamp)
