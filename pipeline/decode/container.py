"""The container of a video file: its video stream, an index of its frames and their times, and what is wrong with it.

Headers lie, so counts and durations come from the packets, or from an MP4's complete sample index, which spares
reading the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.source import formats
from longvlm.schemas.errors import ErrorCode, TerminalError

# What FFmpeg may take a file for. Playlists (hls, concat, dash) are left out: they would make it open other files.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,rm,ivf,dv,h264,hevc,m4v,obu,nut,wtv,"
    "mp3,aac,wav,flac,aiff"  # audio, so that it can be told apart from noise
)
_MOV, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_MIN_MISSING_FRAMES = 3
_DEFAULT_FPS = 25.0
_LONGEST_STILL_S = 600.0  # a longer gap between two frames is a jump of the clock, not a picture that stays


def max_missing_frames(num_frames: int, fps: float) -> int:
    """Most frames that may be missing in one place before a video counts as damaged: 1 %, at least 3, at most 1 s."""
    return max(_MIN_MISSING_FRAMES, min(num_frames // 100, round(fps)))


@dataclass(frozen=True)
class FrameIndex:
    """The frame index of a stream: its N frames in display order, and the K keyframes among them."""

    num_frames: int
    duration_s: float
    keyframes: NDArray[np.int64]  # [K] frame numbers, ascending
    seek_pts: NDArray[np.int64]  # [K] when each is shown: where to seek for it, in the stream's time base
    pts: NDArray[np.int64] | None  # [N] when each is shown; None where taken from the index, or not known at all
    has_closed_gops: bool = False  # no frame is shown before the keyframe that it follows in the file

    def frame_at_pts(self, pts: int) -> int:
        """The number of the frame shown at a presentation time stamp."""
        assert self.pts is not None
        return int(np.searchsorted(self.pts, pts, side="right")) - 1


class VideoFile:
    """An open container, with its video stream chosen: what a player would choose, never a cover picture.

    Raises:
        TerminalError: with the code that says why there is nothing to watch.
    """

    def __init__(self, path: str) -> None:
        import av

        self.path = path
        self.size_bytes = Path(path).stat().st_size
        if self.size_bytes == 0:
            raise TerminalError(ErrorCode.EMPTY_FILE, "The file is empty (0 bytes); upload it again.")
        # Frame rates are counted from the packets here, so FFmpeg need not decode up to 20 frames to guess one.
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file", "fpsprobesize": "0"}
        try:
            self.container: Any = av.open(f"file:{path}", options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise _diagnose_unreadable(path, str(error)) from error
        self.stream: Any = self._choose_stream()
        self.codec: Any = self.stream.codec_context
        self.codec.thread_count = 1  # a worker per core is faster than threads, and takes less memory
        self.codec.thread_type = "NONE"

    def _choose_stream(self) -> Any:
        from av.stream import Disposition

        pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
        streams = [stream for stream in self.container.streams.video if not stream.disposition & pictures]
        best = self.container.streams.best("video")
        if best is None or best not in streams:
            best = max(streams, key=lambda stream: stream.width * stream.height, default=None)
        if best is None:
            others = ", ".join(sorted({stream.type for stream in self.container.streams}))
            if not others:
                raise _diagnose_unreadable(self.path, "it holds no stream")
            raise TerminalError(ErrorCode.NO_VIDEO_STREAM, f"The file has no video track, only {others}.")
        if best.codec_context is None:
            raise TerminalError(
                ErrorCode.UNSUPPORTED_CODEC, f"No decoder here for the video's codec ({best.codec_tag}); transcode it."
            )
        return best

    @property
    def format_name(self) -> str:
        """FFmpeg's name of the container, such as "mov,mp4,m4a,3gp,3g2,mj2"."""
        return str(self.container.format.name)

    @property
    def is_seekable(self) -> bool:
        """Whether seeking lands where it should; elsewhere (TS, AVI, raw streams) reading in order is safer."""
        return self.format_name in (_MOV, _MATROSKA)

    def frame_index_from_packets(self) -> FrameIndex:
        """The frame index by all packets: reads the whole file without decoding it, and leaves it at its end."""
        packets = np.fromiter(self._packet_times(), dtype=[("pts", "f8"), ("is_key", "?"), ("duration", "f8")])
        if not len(packets):
            raise self._no_frames_error()
        if self.stream.frames:
            self._check_complete(self.stream.frames, len(packets))
        is_key = packets["is_key"]
        if not is_key.any():
            is_key[0] = True
        if np.isnan(packets["pts"]).any():
            return self._frame_index_in_order(np.flatnonzero(is_key), len(packets))
        shown = packets["pts"].astype(np.int64)
        pts = np.unique(shown[shown >= shown[is_key].min()])  # before the first keyframe nothing can be shown
        if len(shown) - len(pts) > len(shown) // 2:
            raise TerminalError(
                ErrorCode.DECODE_FAILED,
                f"The video has no keyframe among its first {len(shown) - len(pts)} of {len(shown)} frames, so most "
                "of it cannot be shown; cut or transcode it anew.",
            )
        key_pts = np.unique(shown[is_key])
        time_base = float(self.stream.time_base)
        span = float(np.minimum(np.diff(pts), _LONGEST_STILL_S / time_base).sum())  # in ticks: whole, so added exactly
        last = float(packets["duration"][shown.argmax()]) or span / max(len(pts) - 1, 1)
        return FrameIndex(
            num_frames=len(pts),
            duration_s=(span + last) * time_base or 1 / self.header_fps,
            keyframes=np.searchsorted(pts, key_pts),
            seek_pts=key_pts,
            pts=pts,
            has_closed_gops=bool((shown >= np.maximum.accumulate(np.where(is_key, shown, shown.min()))).all()),
        )

    def _packet_times(self) -> Iterator[tuple[float, bool, int]]:
        """Per packet of a frame that will be shown: pts (NaN where unknown), whether a keyframe, duration."""
        import av

        try:
            for packet in self.container.demux(self.stream):
                if packet.size and not packet.is_discard:
                    pts = np.nan if packet.pts is None else packet.pts
                    yield pts, packet.is_keyframe, packet.duration or 0
        except av.InvalidDataError:  # the rest cannot be read: what is missing shows in the counts
            return

    def frame_index_from_samples(self) -> FrameIndex | None:
        """The frame index by an MP4's sample table, without reading the file; None where there is no complete one.

        Frame numbers then count in file order, which for keyframes is display order but for a few frames in open GOPs.
        """
        if self.format_name != _MOV or not 0 < self.stream.frames <= len(self.stream.index_entries):
            return None
        entries = [entry for entry in self.stream.index_entries if not entry.is_discard]
        within = sum(entry.pos + entry.size <= self.size_bytes for entry in entries)
        if not within:
            raise self._no_frames_error()
        self._check_complete(len(entries), within)
        keys = [number for number, entry in enumerate(entries) if entry.is_keyframe] or [0]
        decode_to_show = (self.stream.start_time or 0) - entries[0].timestamp  # the index has decoding times
        time_base = float(self.stream.time_base)
        span_s = (entries[-1].timestamp - entries[0].timestamp) * time_base
        content_s = span_s * len(entries) / max(len(entries) - 1, 1)
        header_s = (self.stream.duration or 0) * time_base
        trusted = span_s < header_s <= 2 * content_s + 10  # the last frame may be a still that stays for a while
        return FrameIndex(
            num_frames=len(entries),
            duration_s=(header_s if trusted else content_s) or 1 / self.header_fps,
            keyframes=np.array(keys, dtype=np.int64),
            seek_pts=np.array([entries[key].timestamp + decode_to_show for key in keys], dtype=np.int64),
            pts=None,
        )

    def _frame_index_in_order(self, keyframes: NDArray[np.int64], num_frames: int) -> FrameIndex:
        """The frame index of a stream without time stamps, such as raw H.264: frames are counted as they come."""
        return FrameIndex(num_frames, num_frames / self.header_fps, keyframes, np.zeros_like(keyframes), pts=None)

    @property
    def header_fps(self) -> float:
        """Frames per second by the header: good enough to judge what is missing."""
        return float(self.stream.average_rate or self.stream.guessed_rate or _DEFAULT_FPS)

    def _check_complete(self, expected: int, found: int) -> None:
        if expected - found > max_missing_frames(expected, self.header_fps):
            raise TerminalError(
                ErrorCode.TRUNCATED,
                f"The file is cut off: {found} of its {expected} frames are there; upload it again.",
            )

    def _no_frames_error(self) -> TerminalError:
        if formats.is_encrypted(self.path):
            return encrypted_error()
        return TerminalError(ErrorCode.NO_FRAMES, "The file has a header but not one video frame; upload it again.")

    def rewind(self) -> None:
        """Go back to the first packet, by opening the file anew: the one way that works for every format."""
        self.close()
        fresh = VideoFile(self.path)
        self.container, self.stream, self.codec = fresh.container, fresh.stream, fresh.codec

    def close(self) -> None:
        """Close the file."""
        self.container.close()


def encrypted_error() -> TerminalError:
    """The error of a video that is protected against copying."""
    return TerminalError(ErrorCode.ENCRYPTED, "The video is encrypted (DRM) and there is no key for it; decrypt it.")


def _diagnose_unreadable(path: str, reason: str) -> TerminalError:
    """Why FFmpeg could make nothing of a file, from the file's own structure."""
    container = formats.container_of(formats.read_head(path))
    if container is None:
        return TerminalError(
            ErrorCode.NOT_A_VIDEO, "The file is not a video, whatever its name says; remove or exclude it."
        )
    if container == "MP4":
        boxes = formats.top_level_boxes(path)
        _, offset, size = boxes[-1]
        if all(kind not in (b"moov", b"moof") for kind, _, _ in boxes):
            if offset + size >= Path(path).stat().st_size:
                return TerminalError(
                    ErrorCode.TRUNCATED,
                    "The file is cut off: its index (moov) is missing, so recording or upload broke off; upload it "
                    "again.",
                )
            reason = f"no valid box at byte {offset + size}"
        else:
            reason = "its index (moov) cannot be read"
    return TerminalError(ErrorCode.DECODE_FAILED, f"The {container} file is damaged: {reason}; upload it again.")
