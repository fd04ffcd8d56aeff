"""Decoding of local video files with PyAV: exactly, or keyframes alone."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.device import DeviceDecoder
from longvlm.pipeline.decode.frame_index import FrameIndex
from longvlm.pipeline.decode.frames import FrameReader, KeyframeMissingError
from longvlm.pipeline.decode.scaling import Scaler, Size, fitted, letterboxed, resize_nearest, upright
from longvlm.pipeline.decode.survey import frame_index_told, survey_exactly
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.schemas.errors import ErrorCode, TerminalError

Mode = Literal["exact", "keyframe"]
Resize = Literal["decoder", "nearest", "letterbox"]
NEAREST_PX = 224  # what the reference resizes to, whatever the tower takes (LONGVLM.md section 2)
KEYFRAMES = "pyav-keyframes"  # the decoder, where keyframes stand for the frames near them
_DECORD_CODECS = ("h264", "mpeg4")  # what decord used to decode, and whose pixels stay as they were
_CODEC_NAMES = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}


@dataclass(frozen=True)
class DecodedFrames:
    """Decoded frames: of one size, RGB, with the numbers they have in the video and the decoder that made them.

    A frame that is shown in several places is there once: a keyframe may stand for a hundred.
    """

    frames: NDArray[np.uint8]  # [D, height, width, 3]: of the distinct numbers of `shown`, ascending
    shown: tuple[int, ...]  # [F]; as asked for, but in keyframe mode and where a frame is missing
    decoder: str
    cpu_because: str | None = None  # why a GPU did not decode them, where one was to

    def __post_init__(self) -> None:
        """Check the shape: a frame for each number."""
        if self.frames.shape[0] != len(set(self.shown)) or self.frames.ndim != 4:
            raise ValueError(f"{len(set(self.shown))} numbers for frames of shape {self.frames.shape}")

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where the frame of each number of `shown` lies in `frames`, [F]."""
        return np.unique(self.shown, return_inverse=True)[1]


def probe(
    path: str,
    mode: Mode = "exact",
    max_gap_s: float | None = None,
    is_sparse: bool = False,  # noqa: FBT001, FBT002 - goes through JSON
) -> TimedVideo:
    """Probe a video: open it, learn when its frames are shown, and decode the first.

    Args:
        path: of a local file.
        mode: "keyframe" shows the keyframe that is nearest in time to each frame.
        max_gap_s: the longest stretch without a keyframe that is put up with; a video with a longer one is decoded
            exactly all the same.
        is_sparse: whether of the file no more was fetched than its index and what `survey` said to be needed.

    Raises:
        TerminalError: with the code that says why it cannot be watched; of a sparse copy, that more of it is needed.
    """
    close_video()  # first, so that two videos are never held at once
    _OPEN.append(OpenVideo(path, mode, max_gap_s, is_sparse=is_sparse))
    return _OPEN[0].info


def decode(path: str, frames: list[int], size: Size, mode: Mode = "exact", resize: Resize = "decoder") -> DecodedFrames:
    """Decode frames by number, resized to a size without keeping the aspect, as the reference does.

    With resize "letterbox" a frame keeps the shape in which players show it, in the middle of black; with "nearest" it
    is 224 x 224 whatever the size says. The video probed or decoded last is still open, so that going on in it costs
    nothing.

    Raises:
        TerminalError: with the code that says why not.
    """
    if not _OPEN or (_OPEN[0].file.path, _OPEN[0].mode) != (path, mode):
        probe(path, mode)
    return _OPEN[0].decode(frames, size_out(size, resize), resize)


def use_device() -> None:
    """Have this process decode on its GPU from now on, and on the CPU what will not do there."""
    _DEVICES.append(DeviceDecoder())


def can_seek() -> bool:
    """Whether decoding of the video in hand may begin anywhere, without what comes before."""
    return bool(_OPEN) and _OPEN[0].can_seek


def size_out(size: Size, resize: Resize) -> Size:
    """The size that frames have after a resize to another one."""
    return (NEAREST_PX, NEAREST_PX) if resize == "nearest" else (size[0], size[1])


def close_video() -> None:
    """Close the video that is still open."""
    while _OPEN:
        _OPEN.pop().reader.close()


class OpenVideo:
    """A video that is open for decoding: its properties, and its frames on demand."""

    def __init__(self, path: str, mode: Mode, max_gap_s: float | None = None, *, is_sparse: bool = False) -> None:
        self.file = VideoFile(path, is_sparse=is_sparse)
        self.mode = mode
        self._can_use_keyframes = mode == "keyframe" and self.file.fields is None  # a keyframe may be half a picture
        self.reader = FrameReader(self.file, self._frame_index(math.inf if max_gap_s is None else max_gap_s))
        self.info = self._info(self.reader.frame_index)
        self._scaler = Scaler(is_colour_between=not self._can_use_keyframes and self._was_decords)
        self.cpu_because = self._move_to(_DEVICES[0]) if _DEVICES else None  # why a GPU does not decode it

    def _move_to(self, device: DeviceDecoder) -> str | None:
        """Go on with a GPU, if it makes of the first frame what the CPU made; else why not, in a word or two."""
        import av

        reason = device.refuses(self.info.codec, self.file.codec.pix_fmt, is_interlaced=self.file.fields is not None)
        if reason is not None:
            return reason
        file = None
        try:
            file = VideoFile(self.file.path, is_sparse=self.file.is_sparse, on_device=True)
            reader = FrameReader(file, self.reader.frame_index)
            reason = None if self._is_alike(reader) else "other pixels"
        except (TerminalError, av.FFmpegError):
            reason = ErrorCode.DECODE_FAILED.value
        if reason is None:
            self.reader.close()
            self.file, self.reader = reader.file, reader
        elif file is not None:
            file.close()
        return reason

    def _is_alike(self, other: FrameReader) -> bool:
        """Whether another reader has the same first frame: its number, its pixels as stored and shown, how it lies."""
        (number, frame), (other_number, other_frame) = self.reader.first, other.first
        planar, other_planar = self._scaler.planar(frame), self._scaler.planar(other_frame)
        return (
            (number, self.reader.orientation) == (other_number, other.orientation)
            and np.array_equal(planar.to_ndarray(), other_planar.to_ndarray())
            and np.array_equal(self._scaler.rgb(frame), self._scaler.rgb(other_frame))
        )

    def _leave_device(self) -> None:
        """Go on with the CPU: a picture was missing, and whether it is in the file only that can tell."""
        self.cpu_because = ErrorCode.DECODE_FAILED.value
        self.reader.close()
        self.file = VideoFile(self.file.path, is_sparse=self.file.is_sparse)
        self.reader = FrameReader(self.file, self.reader.frame_index)

    def _frame_index(self, max_gap_s: float) -> FrameIndex:
        """The frame index; decides whether keyframes will do."""
        if self._can_use_keyframes:
            told = frame_index_told(self.file)
            if told is not None and told.longest_keyframe_gap_s <= max_gap_s:
                return told
            self._can_use_keyframes = told is None
        if self.file.is_sparse and self.mode == "exact" and (exact := survey_exactly(self.file)) is not None:
            return exact.frame_index
        self._refuse_holes()
        frame_index = self.file.frame_index_from_packets()
        if frame_index.longest_keyframe_gap_s > max_gap_s:
            self._can_use_keyframes = False
        return frame_index

    def _refuse_holes(self) -> None:
        """Raise TerminalError for a sparse copy: what is needed now may not be there."""
        if self.file.is_sparse:
            raise TerminalError(ErrorCode.DECODE_FAILED, "What was fetched of the video will not do.")

    def _info(self, frame_index: FrameIndex) -> TimedVideo:
        width, height = self.file.stream.width, self.file.stream.height
        if self._is_transposed:
            width, height = height, width
        return TimedVideo(
            num_frames=frame_index.num_frames,
            fps=frame_index.num_frames / frame_index.duration_s,
            duration_s=frame_index.duration_s,
            width=width,
            height=height,
            codec=_CODEC_NAMES.get(self.file.codec.name, self.file.codec.name),
            decoder="pyav",
            times_ns=frame_index.times_ns,
        )

    def decode(self, frames: list[int], size: Size, resize: Resize) -> DecodedFrames:
        """See the function `decode`."""
        if self.file.on_device:
            with suppress(TerminalError):  # the CPU is to say what is wrong
                decoded = self._decode(frames, size, resize)
                is_whole = decoded.decoder == KEYFRAMES or decoded.shown == tuple(frames)
                if is_whole and not self.reader.has_problem:
                    return decoded
            self._leave_device()
        return self._decode(frames, size, resize)

    def _decode(self, frames: list[int], size: Size, resize: Resize) -> DecodedFrames:
        wanted = sorted(set(frames))
        if self._can_use_keyframes and (found := self._decode_keyframes(wanted, size, resize)) is not None:
            shown, pixels = found
            decoder = KEYFRAMES
        else:
            shown, pixels = self._resized(self.reader.read_exact(wanted), len(wanted), size, resize)
            decoder = "pyav"
        shown_for = dict(zip(wanted, shown, strict=True))
        return DecodedFrames(pixels, tuple(shown_for[number] for number in frames), decoder, self.cpu_because)

    @property
    def can_seek(self) -> bool:
        """See the function `can_seek`."""
        return self.file.is_seekable if self._can_use_keyframes else self.reader.can_seek

    @property
    def _was_decords(self) -> bool:
        """Whether decord used to decode such a video, so that stores hold tokens of its pixels.

        It was trusted with closed groups that are shown upright, and opened no file whose header tells no duration.
        """
        return (
            self.file.is_seekable
            and self.file.codec.name in _DECORD_CODECS
            and self.reader.frame_index.has_closed_gops
            and self.reader.orientation is None
            and self.file.container.duration is not None
        )

    def _inner(self, stored: Size, size: Size, resize: Resize) -> Size:
        """What a picture that is stored in so many pixels fills of a size, once it is upright.

        A letterboxed one as much as its shape allows: that in which players show it, whose pixels may be no squares.
        """
        if resize != "letterbox":
            return size
        shape = (stored[0], stored[1] * self.file.pixel_aspect)
        return fitted(shape[::-1] if self._is_transposed else shape, size)

    @property
    def _is_transposed(self) -> bool:
        return self.reader.orientation is not None and self.reader.orientation.transpose

    def _decode_keyframes(
        self, wanted: list[int], size: Size, resize: Resize
    ) -> tuple[list[int], NDArray[np.uint8]] | None:
        """The number of the keyframe that is nearest in time to each frame, and the pixels of these, each once.

        None where one cannot be decoded by itself.
        """
        keyframes, near = self.reader.frame_index.keyframes, self.reader.frame_index.keyframes_near(wanted)
        distinct = np.unique(near)
        try:
            pixels = self._resized(self.reader.read_keyframes(distinct.tolist()), len(distinct), size, resize)[1]
        except KeyframeMissingError:  # then all frames are needed to get at the wanted ones
            if self.file.on_device:
                raise self.file.undecodable("") from None
            self._can_use_keyframes = False
            self._refuse_holes()
            self.file.rewind()
            self.reader = FrameReader(self.file, self.file.frame_index_from_packets())
            return None
        return keyframes[near].tolist(), pixels

    def _resized(
        self, source: Iterator[tuple[int, Any]], num_frames: int, size: Size, resize: Resize
    ) -> tuple[list[int], NDArray[np.uint8]]:
        """The numbers of a source's frames, and the pixels of each number once.

        Each is made small as it comes: at full size no more than a few are held. Their own size may change within a
        video, as where transport streams were joined.
        """
        pixels = np.empty((num_frames, *size, 3), dtype=np.uint8)
        orientation = self.reader.orientation
        shown: list[int] = []
        num_distinct = 0
        for number, frame in source:
            if not shown or shown[-1] != number:
                if resize == "nearest":
                    small = resize_nearest(upright(self._scaler.rgb(frame), orientation), size[0])
                else:
                    inner = self._inner((frame.height, frame.width), size, resize)
                    scaled = self._scaler.scale(frame, inner[::-1] if self._is_transposed else inner)
                    small = letterboxed(upright(scaled, orientation), size)
                pixels[num_distinct] = small
                num_distinct += 1
            shown.append(number)
        return shown, pixels[:num_distinct]


_DEVICES: list[DeviceDecoder] = []  # the GPU's decoder, at most one, where this process was to use it
_OPEN: list[OpenVideo] = []  # the video in hand, at most one: units of one video are decoded one after the other
