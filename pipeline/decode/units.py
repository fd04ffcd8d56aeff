"""The decode stage of the index job: a planned video to its frames, one work unit at a time."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from longvlm.pipeline.decode.copy import VideoCopy
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import plan_units
from longvlm.pipeline.decode.scaling import Size, fitted
from longvlm.pipeline.decode.times import NS, TimedVideo
from longvlm.pipeline.decode.video import KEYFRAMES, DecodedFrames
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError, TransientError
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.tables import FRAMES
from longvlm.schemas.timeline import Segment

T = TypeVar("T")
THUMBNAIL_PX = 160  # at the longer side; about 4 kB
_JPEG_QUALITY = 75


@dataclass
class _Rest:
    """What is left of a video behind the units decoded so far, judged by what these took."""

    num_units: int
    most_ms: float  # that one decoder should do; what is more than that is left to others
    spent_ms: float = 0.0

    def too_long_ms(self, unit: int) -> float | None:
        """The CPU milliseconds that are left behind a unit, if they are too many for one decoder."""
        left_ms = self.spent_ms / (unit + 1) * (self.num_units - unit - 1)
        return left_ms if left_ms > self.most_ms else None


def decode_units(
    copy: VideoCopy,
    recipe: IndexRecipe,
    decoder: Decoder,
    *,
    has_thumbnails: bool = False,
    long_decode_s: float = math.inf,
) -> Iterator[pa.Table]:
    """Decode a video of which there is a copy as a recipe asks: yields tables.FRAMES, one row a unit.

    Whatever goes wrong with the video ends in a last row with `error_code` and `error`; there is always a row. Where
    more than `long_decode_s` of decoding are left, of a file that can be decoded from anywhere, the last row says so in
    `rest_ms`: the units behind it are left to other decoders.
    """
    video = copy.video
    row = {"video_id": video["video_id"], "write_id": video["write_id"], "unit": 0, "num_units": 1}
    spent_ms = decoder.cpu_ms
    try:
        if video.get("error_code"):  # its entry in the source already told
            raise TerminalError(ErrorCode(video["error_code"]), video["error"])
        if copy.error is not None:
            raise copy.error
        copy.check_unchanged()
        try:
            info = _from_copy(copy, partial(_probe, copy, recipe, decoder))
            units = plan_units(recipe, info)
            segments = [segment for unit in units for segment in unit]
            rest = _Rest(len(units), math.inf if video.get("end_unit") else long_decode_s * 1e3)
            shape = _shape(recipe, info) if has_thumbnails else None
            row |= info.facts | {"num_units": len(units), "num_segments": len(segments)}
            row["num_pictures"] = sum(recipe.tower.num_pictures(segment.num_frames) for segment in segments)
            asked, told = _asked_for(copy, units), None
            for index in asked:
                row["unit"], began_ms = index, decoder.cpu_ms
                wanted = [frame for segment in units[index] for frame in segment.frames]
                decoded = _from_copy(copy, partial(_decode, copy, wanted, recipe, decoder))
                rest.spent_ms += decoder.cpu_ms - began_ms
                rest_ms = rest.too_long_ms(index) if index else None  # only a later one shows what seeking gives
                if rest_ms is not None and not _is_repeatable(copy, wanted, recipe, decoder, decoded):
                    rest_ms, rest.most_ms = None, math.inf
                if index == asked[-1]:
                    copy.check_unchanged()
                row |= {"decoder": decoded.decoder, "decode_ms": decoder.cpu_ms - spent_ms, **copy.told}
                row |= {"keyframe_shift_s": _shift_s(wanted, decoded, info), "rest_ms": rest_ms}
                row["cpu_because"] = decoded.cpu_because if decoded.cpu_because != told else None
                spent_ms, told = decoder.cpu_ms, decoded.cpu_because
                yield _unit(row, _as_shown(units[index], decoded, info), decoded, info, shape)
                if rest_ms is not None:
                    return
        finally:
            decoder.close_video()
    except PipelineError as error:
        yield failed_unit(row | {"decode_ms": decoder.cpu_ms - spent_ms, **copy.told}, error)


def _asked_for(copy: VideoCopy, units: list[list[Segment]]) -> range:
    """Which of a video's units are to be decoded. Raises TransientError where there is none of them any more."""
    asked = copy.wanted(units)
    if not asked:
        raise TransientError(ErrorCode.NETWORK, "The file was replaced by a shorter one while decoders were at it.")
    return asked


def _is_repeatable(
    copy: VideoCopy, frames: list[int], recipe: IndexRecipe, decoder: Decoder, decoded: DecodedFrames
) -> bool:
    """Whether a decoder that begins with these frames gives the same, which is tried.

    By another one, since what this one gives next may depend on where it began.
    """
    if not decoder.can_seek():
        return False
    with Decoder(decoder.deadline_s, decoder.memory_limit_bytes) as other:
        try:
            again = _decode(copy, frames, recipe, other)
            is_same = other.can_seek() and (again.shown, again.decoder) == (decoded.shown, decoded.decoder)
        except TerminalError:  # what one decoder gave another one does not
            return False
        finally:
            decoder.cpu_ms += other.cpu_ms
    return is_same and np.array_equal(again.frames, decoded.frames)


def _from_copy(copy: VideoCopy, read: Callable[[], T]) -> T:
    """What is read from a copy; where a sparse one will not do, from the whole file."""
    try:
        return read()
    except TerminalError as error:
        if not copy.is_sparse:
            raise
        copy.complete(error.code.value)
        return read()


def _probe(copy: VideoCopy, recipe: IndexRecipe, decoder: Decoder) -> TimedVideo:
    return decoder.probe(copy.path, recipe.decode, recipe.segment_s, is_sparse=copy.is_sparse)


def _decode(copy: VideoCopy, frames: list[int], recipe: IndexRecipe, decoder: Decoder) -> DecodedFrames:
    """Frames of the video; it is probed anew where the decoder's child or the copy is another one by now."""
    if decoder.probed != (copy.path, copy.is_sparse):
        _probe(copy, recipe, decoder)
    return decoder.decode(copy.path, frames, recipe.tower.frame_size, recipe.decode, recipe.shown)


def failed_unit(video: dict[str, Any], error: PipelineError) -> pa.Table:
    """The FRAMES row of a unit that failed: of a whole planned video, or with what is known of it in `video`."""
    row = {"unit": 0, "num_units": 1, "decode_ms": 0.0} | {name: video[name] for name in FRAMES.names if name in video}
    row |= {"error_code": error.code.value, "error": error.message, "segments": []}
    return pa.Table.from_pylist([row], schema=FRAMES)


def _shape(recipe: IndexRecipe, info: TimedVideo) -> Size:
    """The shape of what frames show: that of the video, which they lost, unless they kept it in the middle of black."""
    return recipe.tower.frame_size if recipe.shown == "letterbox" else (info.height, info.width)


def thumbnail(frame: NDArray[np.uint8], shape: Size) -> bytes:
    """A small JPEG of a frame [h, w, 3], in the shape of its video, of which only that counts."""
    rows, columns = fitted(shape, (THUMBNAIL_PX, THUMBNAIL_PX))
    picture = Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR)
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=_JPEG_QUALITY)
    return packed.getvalue()


def _as_shown(unit: list[Segment], decoded: DecodedFrames, info: TimedVideo) -> list[Segment]:
    """The segments with the frames that were really decoded."""
    shown, segments = iter(decoded.shown), []
    for segment in unit:
        frames = tuple(next(shown) for _ in segment.frames)
        start_s, end_s = info.time_of(frames[0]), info.time_of(frames[-1] + 1)
        segments.append(segment if frames == segment.frames else segment.showing(frames, start_s, end_s))
    return segments


def _shift_s(wanted: list[int], decoded: DecodedFrames, info: TimedVideo) -> float | None:
    """How far in time the farthest keyframe lies from the frame that it stands for; None where none does."""
    if decoded.decoder != KEYFRAMES:
        return None
    return float(np.abs(info.times_ns[list(decoded.shown)] - info.times_ns[wanted]).max()) / NS


def _unit(
    row: dict[str, Any], segments: list[Segment], decoded: DecodedFrames, info: TimedVideo, shape: Size | None
) -> pa.Table:
    """The FRAMES row of a unit; with thumbnails of a shape, where there is one."""
    middles = np.cumsum([s.num_frames for s in segments]) - [(s.num_frames + 1) // 2 for s in segments]
    shown = decoded.places[middles].tolist()
    thumbnails = {place: thumbnail(decoded.frames[place], shape) for place in set(shown)} if shape else {}
    described = [
        {
            "segment": s.index,
            "start_s": s.start_s,
            "end_s": s.end_s,
            "frames": list(s.frames),
            "times_s": [info.time_of(frame) for frame in s.frames],
            "thumbnail": thumbnails.get(place),
        }
        for s, place in zip(segments, shown, strict=True)
    ]
    _, height, width, _ = decoded.frames.shape
    known = row | {"segments": described, "frame_height": height, "frame_width": width}
    table = pa.Table.from_pylist([known], schema=FRAMES)
    offsets = np.array([0, decoded.frames.nbytes], dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(decoded.frames))]
    frames = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)  # without copying 15 MB
    return table.set_column(FRAMES.get_field_index("frames"), FRAMES.field("frames"), frames)
