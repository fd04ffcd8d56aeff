"""The container of a video file: its video stream, what is needed to index its frames, and what is wrong with it.

Headers lie, so counts and durations come from the packets, or from an MP4's complete sample index, which spares
reading the file.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from longvlm.pipeline.decode.device import hwaccel
from longvlm.pipeline.decode.fields import field_pairs
from longvlm.pipeline.decode.frame_index import (
    PACKET,
    FrameIndex,
    index_between_keyframes,
    index_in_order,
    index_packets,
    nanoseconds,
)
from longvlm.pipeline.decode.times import MAX_FRAMES
from longvlm.pipeline.source import formats
from longvlm.schemas.errors import ErrorCode, TerminalError

# What FFmpeg may take a file for. Playlists (hls, concat, dash) are left out: they would make it open other files.
_DEMUXERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,rm,ivf,dv,h264,hevc,m4v,obu,nut,wtv,"
    "mp3,aac,wav,flac,aiff"  # audio, so that it can be told apart from noise
)
_MOV, _MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
_STEADY_CLOCKS = (_MOV, _MATROSKA, "avi")  # times are durations added up, or written by one who knew the whole
_DECODING_STAMPS = ("avi", "asf")  # may know no other time of a packet than its place in the file
_MIN_MISSING_FRAMES = 3
_DEFAULT_FPS = 25.0
_BLOCK_HEADER_BYTES = 64  # more than any block of a Matroska has before its frame
_CLOCK_TIME = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


def max_missing_frames(num_frames: int, fps: float) -> int:
    """Most frames that may be missing in one place before a video counts as damaged: 1 %, at least 3, at most 1 s."""
    return max(_MIN_MISSING_FRAMES, min(num_frames // 100, round(fps)))


class VideoFile:
    """An open container, with its video stream chosen: what a player would choose, never a cover picture.

    Args:
        path: of a local file.
        is_brief: look at its headers alone, and at no packet to find out more: of a sparse copy there may be none yet.
        is_sparse: there are holes in it, between what is needed.
        on_device: its pictures are decoded by a GPU.

    Raises:
        TerminalError: with the code that says why there is nothing to watch, or why not on a GPU.
    """

    def __init__(self, path: str, *, is_brief: bool = False, is_sparse: bool = False, on_device: bool = False) -> None:
        import av

        self.path, self.is_sparse, self.on_device = path, is_sparse, on_device
        self.size_bytes = Path(path).stat().st_size
        if self.size_bytes == 0:
            raise TerminalError(ErrorCode.EMPTY_FILE, "The file is empty (0 bytes); upload it again.")
        # Frame rates are counted from the packets here, so FFmpeg need not decode up to 20 frames to guess one.
        options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file", "fpsprobesize": "0"}
        if is_brief:
            options |= {"probesize": "32", "analyzeduration": "1"}
        try:
            self.container: Any = av.open(
                f"file:{path}",
                options=options,
                metadata_errors="replace",
                hwaccel=hwaccel() if on_device else None,
            )
        except (av.FFmpegError, ValueError) as error:
            raise _diagnose_unreadable(path, str(error)) from error
        except RuntimeError as error:  # of PyAV: no stream that the device could decode
            raise TerminalError(ErrorCode.UNSUPPORTED_CODEC, f"{error}.") from error
        self.stream: Any = self._choose_stream()
        self.codec: Any = self.stream.codec_context
        self.codec.thread_count = 1  # a worker per core is faster than threads, and takes less memory
        self.codec.thread_type = "NONE"
        self.fields = field_pairs(self.codec.extradata) if self.codec.name == "h264" else None

    def _choose_stream(self) -> Any:
        from av.stream import Disposition

        pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
        streams = [stream for stream in self.container.streams.video if not stream.disposition & pictures]
        decodable = [stream for stream in streams if stream.codec_context is not None]
        best = self.container.streams.best("video")
        if best is None or best not in (decodable or streams):
            best = max(decodable, key=lambda stream: stream.width * stream.height, default=next(iter(streams), None))
        if best is None:
            others = ", ".join(sorted({stream.type for stream in self.container.streams}))
            if not others:
                raise _diagnose_unreadable(self.path, "it holds no stream")
            raise TerminalError(ErrorCode.NO_VIDEO_STREAM, f"The file has no video track, only {others}.")
        if best.codec_context is None:
            raise TerminalError(
                ErrorCode.UNSUPPORTED_CODEC,
                "The video is coded in a way that nothing here decodes; transcode it, to H.264 for example.",
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

    @property
    def pixel_aspect(self) -> float:
        """How wide a stored pixel is shown, in its heights: not 1 in DV, DVDs and what was made of them."""
        return float(self.stream.sample_aspect_ratio or 1)

    def frame_index_from_packets(self) -> FrameIndex:
        """The frame index by all packets: reads the whole file without decoding it, and leaves it at its end."""
        packets = np.fromiter(self._packets(), dtype=PACKET)
        if packets["is_discard"].all():
            raise self._no_frames_error()
        if len(packets) > MAX_FRAMES:
            raise TerminalError(
                ErrorCode.TOO_LARGE, f"The video has more than {MAX_FRAMES} frames; cut it into several files."
            )
        if self._num_expected() - len(packets) > max_missing_frames(len(packets), self.header_fps):
            self._check_complete(self._num_expected(exactly=True), len(packets))
        pts = packets["pts"]
        in_order = self.format_name in _DECODING_STAMPS and (np.diff(pts) > 0).all()
        if in_order or np.isnan(pts).any():
            return index_in_order(packets, self.stream.time_base, self.header_fps)
        jumps = self.format_name not in _STEADY_CLOCKS
        index = index_packets(packets, self.stream.time_base, self.header_fps, jumps=jumps)
        if self.format_name == "avi" and self.stream.frames > len(packets) and formats.has_whole_chunks(self.path):
            # slots at its end are empty: what was there before stays
            slots_s = (self.stream.duration or 0) * float(self.stream.time_base)
            index = replace(index, duration_s=max(index.duration_s, slots_s))
        return index

    def _packets(self) -> Iterator[tuple[float, float, float, bool, bool]]:
        """Every packet that holds something, in file order, as a `PACKET`; second fields are not shown."""
        import av

        if self.fields is not None:
            self.fields.open_field = None
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    pts, dts = packet.pts, packet.dts
                    is_second = self.fields is not None and self.fields.is_second(bytes(packet))
                    yield (
                        np.nan if pts is None else pts,
                        np.nan if dts is None else dts,
                        packet.duration or 0 if self.fields is None else 0,  # it may be a field's
                        packet.is_keyframe and not is_second,
                        packet.is_discard or is_second,
                    )
        except av.FFmpegError:  # the rest cannot be read: what is missing shows in the counts
            return

    def frame_index_from_samples(self) -> FrameIndex | None:
        """The frame index by an MP4's sample table, without reading the file.

        The table has decoding times, which in order are the times of showing only where frames follow each other
        evenly and no edit list hides any. None where they do not, or where there is no complete table. Frame numbers
        then count in file order, which for keyframes is display order but for a few frames in open GOPs.
        """
        if self.format_name != _MOV or not 0 < self.stream.frames <= len(self.stream.index_entries):
            return None
        entries = list(self.stream.index_entries)
        times = np.array([entry.timestamp for entry in entries], dtype=np.int64)
        steps = np.diff(times)
        if any(entry.is_discard for entry in entries) or (len(steps) and np.ptp(steps) > 1):
            return None
        within = sum(entry.pos + entry.size <= self.size_bytes for entry in entries)
        if not within:
            raise self._no_frames_error()
        self._check_complete(len(entries), within)
        keys = np.array([number for number, entry in enumerate(entries) if entry.is_keyframe] or [0], dtype=np.int64)
        seek_pts = times[keys] - times[0] + (self.stream.start_time or 0)
        span_s = float(times[-1] - times[0]) * float(self.stream.time_base)
        content_s = span_s * len(entries) / max(len(entries) - 1, 1)
        header_s = (self.stream.duration or 0) * float(self.stream.time_base)
        trusted = span_s < header_s <= 2 * content_s + 10  # the last frame may be a still that stays for a while
        return FrameIndex(
            times_ns=nanoseconds(times, self.stream.time_base),
            duration_s=(header_s if trusted else content_s) or 1 / self.header_fps,
            keyframes=keys,
            seek_pts=seek_pts,
            start_pts=int(seek_pts[0]),
        )

    def frame_index_from_cues(self) -> FrameIndex | None:
        """The frame index by a Matroska's cues, without reading the file; None where there are none.

        They have the keyframes' times, and the header the frames a second: how many there are in between is told by
        these, not counted. The file must have been opened briefly, so that a sparse copy gives the same.
        """
        if self.format_name != _MATROSKA or not (cues := self.cues()):
            return None
        fps, end_s = self.stream.average_rate, self._end_s
        if not fps or end_s is None:
            return None
        key_pts = np.array(list(cues), dtype=np.int64)
        time_base = self.stream.time_base
        return index_between_keyframes(key_pts, end_s / float(time_base), time_base, float(fps))

    def cues(self) -> dict[int, int]:
        """A Matroska's cues: the byte at which the cluster of a keyframe begins, by its time stamp, ascending."""
        self.container.seek(0, stream=self.stream)  # only then they are read
        return dict(sorted((entry.timestamp, entry.pos) for entry in self.stream.index_entries if entry.is_keyframe))

    def packets_from(self, pts: int) -> Iterator[Any]:
        """The packets from that one on which is shown at a time stamp; none where seeking leads past it.

        FFmpeg seeks in an MP4 by decoding times, as if every frame were shown as long after as the first: where frame
        rates vary it may stop at a keyframe before.
        """
        self.container.seek(pts, stream=self.stream)
        is_there = False
        for packet in self.container.demux(self.stream):
            is_there = is_there or packet.pts == pts
            if is_there:
                yield packet
            elif packet.dts is None or packet.dts > pts:
                return

    def end_of_keyframe(self, pts: int) -> int | None:
        """Where the keyframe of a time stamp ends, in bytes from the beginning of a Matroska; None where it is not."""
        import av

        self.container.seek(pts, stream=self.stream)
        try:
            packet = next(self.container.demux(self.stream))
        except av.FFmpegError:
            return None
        if packet.pts != pts or packet.pos is None or not packet.size:
            return None
        return int(packet.pos + packet.size) + _BLOCK_HEADER_BYTES

    @property
    def _end_s(self) -> float | None:
        """When the last frame ends by the headers: of this stream where that stands in a tag, else of the file."""
        import av

        if tagged := _CLOCK_TIME.fullmatch(self.stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = map(float, tagged.groups())
            return 3600 * hours + 60 * minutes + seconds
        return self.container.duration / av.time_base if self.container.duration else None

    @property
    def header_fps(self) -> float:
        """Frames per second by the header: good enough to judge what is missing."""
        return float(self.stream.average_rate or self.stream.guessed_rate or _DEFAULT_FPS)

    def _num_expected(self, *, exactly: bool = False) -> int:
        """How many packets the header promises, 0 where it does not say; `exactly` leaves out those that are empty.

        An MP4's header counts samples that hold nothing and those that its edit list cuts off, which its sample table
        does not. An AVI's counts slots without a picture; whether it is all there, its outermost chunks say.
        """
        promised = int(self.stream.frames)
        if exactly and self.format_name == _MOV:
            return sum(entry.size > 0 for entry in self.stream.index_entries)
        if exactly and self.format_name == "avi" and formats.has_whole_chunks(self.path):
            return 0
        return promised

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

    def undecodable(self, problem: str) -> TerminalError:
        """The error of a video of which no frame can be decoded, with the decoder's words."""
        if self.codec.name == "hevc" and formats.has_alpha_layer(self.codec.extradata or b""):
            return TerminalError(
                ErrorCode.UNSUPPORTED_CODEC,
                "The video is HEVC with an alpha layer, which nothing here decodes; export it without transparency.",
            )
        words = f"{self.codec.name}{': ' if problem else ''}{problem}"
        return TerminalError(ErrorCode.DECODE_FAILED, f"Not one frame could be decoded ({words}); transcode the video.")

    def rewind(self) -> None:
        """Go back to the first packet, by opening the file anew: the one way that works for every format."""
        self.close()
        fresh = VideoFile(self.path, is_sparse=self.is_sparse, on_device=self.on_device)
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
