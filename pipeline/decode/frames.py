"""Decoding frames of an open video by number, with PyAV: exactly, or the keyframes alone."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from longvlm.pipeline.decode.container import VideoFile, encrypted_error, max_missing_frames
from longvlm.pipeline.decode.frame_index import FrameIndex
from longvlm.pipeline.decode.scaling import Orientation, orientation_of
from longvlm.pipeline.decode.times import NS
from longvlm.pipeline.source.formats import is_encrypted
from longvlm.schemas.errors import ErrorCode, TerminalError

# Packets of these that no other refers to may be skipped unless wanted; on AV1 that gave wrong frames.
_SKIPPABLE = ("h264", "hevc")
_START = -1  # in place of a keyframe: the first packet
_HIDDEN = {"vp8": 2, "vp9": 2, "libvpx": 2, "libvpx-vp9": 2}  # time stamps in a row that may be of frames never shown


class KeyframeMissingError(Exception):
    """A keyframe is missing: one that the index promised could not be decoded by itself."""


class FrameReader:
    """A reader of one video's frames that keeps its position: reading forward in many calls decodes nothing twice.

    Raises:
        TerminalError: no frame of the video can be decoded.
    """

    def __init__(self, file: VideoFile, frame_index: FrameIndex) -> None:
        self.file = file
        self.frame_index = frame_index
        self._max_missing = max_missing_frames(frame_index.num_frames, file.header_fps)
        self._can_seek = file.is_seekable and frame_index.pts is not None
        self._can_skip_packets = self._can_seek and file.codec.name in _SKIPPABLE
        self._targets: set[int] = set()
        self._next_target = 0
        self._keys_in_order: Iterator[Any] | None = None
        self._key_place = -1
        self._fed = -1  # highest frame number handed to the decoder
        self._last: tuple[int, Any] | None = None  # the frame shown now
        self._ahead: tuple[int, Any] | None = None  # decoded, but to be shown later
        self._decoding: Iterator[tuple[int, Any]] = iter(())
        self._problem = ""  # the last that the decoder had with a packet
        self._seek(_START)
        first = self._first_keyframe() if file.is_sparse else next(self._decoding, None)
        if first is None:
            if is_encrypted(file.path):
                raise encrypted_error()
            raise file.undecodable(self._problem)
        self.orientation: Orientation | None = orientation_of(first[1])
        self._first: tuple[int, Any] = first
        self._ahead = first
        if file.is_sparse:
            self._seek(_START)

    def _seek(self, key: int) -> None:
        """Go to a keyframe, by its place among the keyframes; to the start where seeking is unreliable."""
        file, pts = self.file, self.frame_index.start_pts if key == _START else self.frame_index.seek_pts[key]
        if file.is_sparse:  # what lies before may not be there
            packets = file.packets_from(int(pts))
        else:
            if file.is_seekable:
                file.container.seek(int(pts), stream=file.stream)
            else:
                file.rewind()
            packets = file.container.demux(file.stream)
        file.codec.skip_frame = "DEFAULT"  # whatever was passed over before
        self._fed, self._last, self._ahead, self._decoding = -1, None, None, self._decode(packets)

    def _decode(self, packets: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of some packets in display order, passing over those that are damaged."""
        import av

        codec, count = self.file.codec, 0
        for packet in self._restamped(packets):
            number = self._number(packet.pts, self._fed + 1)
            if self._can_skip_packets:
                codec.skip_frame = "NONREF" if self._may_skip(number) else "DEFAULT"
            self._fed = max(self._fed, number)
            try:
                frames = packet.decode()
            except av.EOFError:
                return
            except av.FFmpegError as error:  # what is missing will show when a frame is asked for
                self._problem = error.strerror
                count += 1
                continue
            for frame in frames:
                number = self._number(frame.pts, count)
                count = number + 1
                if number >= 0:
                    yield number, frame

    def _may_skip(self, number: int) -> bool:
        """Whether a frame need not be decoded, if no other refers to it.

        Each frame decoded drives out one that waits to be shown. In a sparse copy there are no more packets behind a
        target than drive it out if all are decoded.
        """
        is_awaited = self.file.is_sparse and self._fed >= self._next_target
        return bool(self._targets) and number not in self._targets and not is_awaited

    def _restamped(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Some packets, as far as the file can be read; where its clock jumps, stamped anew."""
        import av

        stamps = self.frame_index.stamps
        place = 0
        try:
            for packet in packets:
                if stamps is not None and packet.size and place < len(stamps):
                    packet.pts = packet.dts = int(stamps[place])
                    place += 1
                yield packet
        except av.FFmpegError as error:  # what is missing will show when a frame is asked for
            self._problem = error.strerror

    def _number(self, pts: int | None, in_order: int) -> int:
        return in_order if pts is None or self.frame_index.pts is None else self.frame_index.frame_at_pts(pts)

    def close(self) -> None:
        """Close file, decoder and frames at once: left to the garbage collector they would pile up."""
        self._decoding = iter(())
        self._keys_in_order = self._last = self._ahead = None
        self.file.close()

    # --- exact ---

    def read_exact(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """(number shown, frame) for each of `wanted`, which ascend.

        Where a frame is missing, the one shown at its time stands in for it, if it is near.

        Raises:
            TerminalError: more is missing than `max_missing_frames` allows.
        """
        if (
            self._can_skip_packets and self._targets and self._fed >= wanted[0]
        ):  # may have been skipped, not having been wanted
            self._seek(self._key_before(wanted[0]))
        self._targets = set(wanted)
        for number in wanted:
            self._next_target = number
            key = self._key_before(number)
            if self._position > number or (
                self._can_seek and key != _START and self.frame_index.keyframes[key] > self._fed
            ):
                self._seek(key)
            shown = self._shown_at(number)
            if self.file.is_sparse and (shown is None or shown[0] != number):
                raise self._missing(number)
            if self._can_seek and (shown is None or number - shown[0] > _HIDDEN.get(self.file.codec.name, 0)):
                self._can_seek = self._can_skip_packets = (
                    False  # seeking does not land where it should: from now on, in order, with a decoder that is new
                )
                self.file.rewind()
                self._seek(_START)
                shown = self._shown_at(number)
            shown = shown or self._ahead
            if shown is None or abs(number - shown[0]) > self._max_missing:
                raise self._missing(number)
            yield shown

    @property
    def first(self) -> tuple[int, Any]:
        """(number, frame) of the first that could be decoded."""
        return self._first

    @property
    def has_problem(self) -> bool:
        """Whether the decoder had one with a packet so far."""
        return bool(self._problem)

    @property
    def can_seek(self) -> bool:
        """Whether exact decoding may begin at any frame at little cost; no more, once a seek went astray."""
        return self._can_seek

    @property
    def _position(self) -> int:
        return -1 if self._last is None else self._last[0]

    def _key_before(self, number: int) -> int:
        """The place of the last keyframe by then; the start where there is none, or where seeking is unreliable."""
        if not self._can_seek:
            return _START
        return int(np.searchsorted(self.frame_index.keyframes, number, side="right")) - 1

    def _shown_at(self, number: int) -> tuple[int, Any] | None:
        """The last frame with at most this number, decoding on as far as needed."""
        while True:
            if self._ahead is None:
                self._ahead = next(self._decoding, None)
            if self._ahead is None or self._ahead[0] > number:
                return self._last
            self._last, self._ahead = self._ahead, None
            if self._last[0] == number:
                return self._last

    def _missing(self, number: int) -> TerminalError:
        frame_index = self.frame_index
        time_s = frame_index.times_ns[number] / NS
        return TerminalError(
            ErrorCode.DECODE_FAILED,
            f"The video is damaged: nothing can be decoded around {time_s:.1f} s of {frame_index.duration_s:.1f} s; "
            "upload it again.",
        )

    # --- keyframes ---

    def read_keyframes(self, keys: list[int]) -> Iterator[tuple[int, Any]]:
        """(number, frame) of keyframes, by their place among the keyframes, ascending: one packet decoded for each.

        Raises:
            KeyframeMissingError: a keyframe gave no frame by itself.
        """
        import av

        if keys[0] == 0 and self._first[0] == self.frame_index.keyframes[0]:
            yield self._first
            keys = keys[1:]
        for key, packet in zip(keys, self._key_packets(keys), strict=True):
            codec = self.file.codec
            codec.skip_frame = "DEFAULT"
            try:
                frames = [*codec.decode(packet), *codec.decode(None)]
            except av.FFmpegError:
                frames = []
            codec.flush_buffers()
            if not frames:
                raise KeyframeMissingError
            yield int(self.frame_index.keyframes[key]), frames[0]

    def _first_keyframe(self) -> tuple[int, Any] | None:
        """The first keyframe by itself, for behind it there may be a hole; None where it gives no frame."""
        self._first = (-1, None)
        try:
            return next(self.read_keyframes([0]))
        except KeyframeMissingError:
            return None

    def _key_packets(self, keys: list[int]) -> Iterator[Any]:
        """The packet of each keyframe: by seeking, or where that is unreliable by reading on to it."""
        for key in keys:
            if self.file.is_seekable:
                packet = next(self._packets_at(int(self.frame_index.seek_pts[key])), None)
                if packet is None or not (packet.size and packet.is_keyframe):
                    raise KeyframeMissingError
                yield packet
            else:
                yield self._read_on_to(key)

    def _packets_at(self, pts: int) -> Iterator[Any]:
        """The packets from where seeking leads; where frames are told apart by their stamps, from that very one on."""
        if self.frame_index.pts is not None:
            return self.file.packets_from(pts)
        self.file.container.seek(pts, stream=self.file.stream)
        packets: Iterator[Any] = self.file.container.demux(self.file.stream)
        return packets

    def _read_on_to(self, key: int) -> Any:
        if self._key_place >= key or self._keys_in_order is None:
            self.file.rewind()
            packets = self.file.container.demux(self.file.stream)
            self._keys_in_order = (packet for packet in packets if packet.size and packet.is_keyframe)
            self._key_place = -1
        for packet in self._keys_in_order:
            self._key_place += 1
            if self._key_place == key:
                return packet
        raise KeyframeMissingError
