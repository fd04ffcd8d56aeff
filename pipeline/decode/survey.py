"""What of a video's file is needed to show some frames of it, told by the file's own index alone.

A remote object need not be fetched whole then: these functions run in the decoder's child over a sparse copy, in which
there is no more than that index yet, and name the byte ranges that are to be filled in.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.frame_index import FrameIndex, index_packets
from longvlm.pipeline.decode.sample_table import sample_packets
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.schemas.errors import ErrorCode, TerminalError

_MOST_SURVEYED = 4  # a worker fetches two at a time
_HEADS_S = 0.25  # of a Matroska's cluster, this much is read to find out how long its keyframe is ...
_HEAD_BYTES = (16 << 10, 256 << 10)  # ... within these bounds
_MOST_REORDERED = 17  # packets that a decoder takes in before it gives out the frame of one: H.264 and HEVC hold 16
_NUM_PROBED = 32  # packets at the beginning, of which FFmpeg decodes up to 20 to find out how frames are reordered
_SOUND_BYTES = 64 << 10  # at most between two packets of pictures that come as one range ...
_SOUND_SHARE = 256  # ... nor more than this part of the file: there are some hundred groups at most

Range = Sequence[int]  # start and end, bytes


@dataclass(frozen=True)
class Survey:
    """What is known of a file of which keyframes are to be shown: its frames, and where the keyframes lie in it."""

    path: str
    frame_index: FrameIndex
    starts: NDArray[np.int64]  # [K] bytes; of a Matroska those of the clusters
    ends: NDArray[np.int64] | None  # [K]; None where only the clusters say so
    head_bytes: int  # of a cluster, to be read first


def frame_index_told(file: VideoFile) -> FrameIndex | None:
    """The frame index that the file's own index tells, be it sparse or whole; None where it does not tell enough."""
    samples = file.frame_index_from_samples()
    if samples is not None:
        return samples
    brief = VideoFile(file.path, is_brief=True)  # which leaves the other one where it stands
    try:
        told = survey_exactly(brief)
        return brief.frame_index_from_cues() if told is None else told.frame_index
    finally:
        brief.close()


def survey(path: str, mode: str, max_gap_s: float | None) -> TimedVideo | str:
    """Survey a file of which the index is there: its frames, or in a word why not all that is wanted is known by it.

    Args:
        path: of a sparse copy.
        mode: "exact" or "keyframe", see `video.probe`.
        max_gap_s: the longest stretch without a keyframe that will do in keyframe mode.

    The size of its pictures is the stored one, not yet turned.
    """
    _SURVEYED.pop(path, None)
    file = VideoFile(path, is_brief=True)
    try:
        if file.fields is not None:
            return "interlaced"
        known: ExactSurvey | Survey | str
        if mode == "exact":
            known = survey_exactly(file) or "no exact times of frames"
        else:
            known = _survey_keyframes(file, max_gap_s)
        if isinstance(known, str):
            return known
        while len(_SURVEYED) >= _MOST_SURVEYED:
            _SURVEYED.pop(next(iter(_SURVEYED)))
        _SURVEYED[path] = known
        frame_index = known.frame_index
        return TimedVideo(
            num_frames=frame_index.num_frames,
            fps=frame_index.num_frames / frame_index.duration_s,
            duration_s=frame_index.duration_s,
            width=file.stream.width,
            height=file.stream.height,
            codec=file.codec.name,
            decoder="pyav",
            times_ns=frame_index.times_ns,
        )
    finally:
        file.close()


def missing_ranges(path: str, frames: list[int], have: Sequence[Range]) -> list[tuple[int, int]]:
    """Which bytes of a surveyed file are needed to show some frames, or the keyframes nearest to them, and the first.

    Args:
        path: of one of the files that were surveyed last.
        frames: by number.
        have: the ranges that are filled in, ascending and apart. Of a Matroska, more may be needed once these are.

    Raises:
        TerminalError: (decode_failed) what was filled in to decode exactly is not what the index promised.
    """
    known = _SURVEYED[path]
    if isinstance(known, Survey):
        return _not_filled(_keyframe_ranges(known, frames, have), have)
    groups = known.groups(frames)
    missing = _not_filled(known.ranges([*groups, *known.probed]), have)
    if not missing:
        _check_groups(known, groups)
    return missing


def _not_filled(wanted: Sequence[tuple[int, int]], have: Sequence[Range]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in wanted if _filled(have, start) < end - start]


# --- exact ---


@dataclass(frozen=True)
class ExactSurvey:
    """What is known of a file in which whole groups of pictures are to be decoded: its frames, and all its packets."""

    path: str
    frame_index: FrameIndex
    packets: NDArray[np.void]  # [P] of `sample_table.SAMPLE`

    def groups(self, frames: list[int]) -> list[tuple[int, int]]:
        """The packets that must be decoded to show some frames: of each keyframe before one, the first and the last.

        They are those from the keyframe up to the frame; then as many as a decoder may take in before it gives that
        frame out. Leading pictures of an open group follow the next keyframe in the file, and so they reach beyond it.
        """
        index, packets = self.frame_index, self.packets
        assert index.pts is not None
        shown = np.flatnonzero(~packets["is_discard"])
        shown = shown[np.argsort(packets["pts"][shown], kind="stable")]
        numbers = np.array(sorted(set(frames)), dtype=np.int64)
        lasts = shown[np.searchsorted(packets["pts"][shown], index.pts[numbers])] + _MOST_REORDERED
        keys = np.searchsorted(index.keyframes, numbers, side="right") - 1
        firsts = np.where(keys < 0, 0, _key_places(packets, index)[keys])
        lasts = np.minimum(lasts, len(packets) - 1)
        return [(int(first), int(lasts[firsts == first].max())) for first in np.unique(firsts)]

    @property
    def probed(self) -> list[tuple[int, int]]:
        """The packets that must be there for the file to be opened: FFmpeg decodes some at its beginning.

        The first keyframe that is shown tells how pictures are turned.
        """
        first = int(_key_places(self.packets, self.frame_index)[0])
        return [(0, min(_NUM_PROBED, len(self.packets)) - 1), (first, first)]

    def read(self, file: VideoFile, first: int, last: int) -> Iterator[Any]:
        """The packets of a group as FFmpeg gives them."""
        packets = file.packets_from(int(self.packets["pts"][first]))
        return islice((packet for packet in packets if packet.size), last - first + 1)

    def ranges(self, groups: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The bytes of some packets, with the sound that lies between them."""
        packets = np.concatenate([self.packets[first : last + 1] for first, last in groups])
        starts, ends = packets["pos"], packets["pos"] + packets["size"]
        near = min(_SOUND_BYTES, Path(self.path).stat().st_size // _SOUND_SHARE)
        return _merged(zip(starts.tolist(), ends.tolist(), strict=True), near)


def survey_exactly(file: VideoFile) -> ExactSurvey | None:
    """The survey of an MP4 of which any frame may be wanted; None where its sample table does not tell enough."""
    packets = sample_packets(file)
    if packets is None or not (packets["is_key"] & ~packets["is_discard"]).any():
        return None
    return ExactSurvey(file.path, index_packets(packets, file.stream.time_base, file.header_fps, jumps=False), packets)


def _check_groups(known: ExactSurvey, groups: Sequence[tuple[int, int]]) -> None:
    """Raise TerminalError where packets that are filled in are no keyframes that should be, or the other way round.

    FFmpeg looks into the packets of some codecs, and by these the whole file would be decoded.
    """
    file = VideoFile(known.path, is_brief=True)
    try:
        for first, last in groups:
            found = [(packet.pos, packet.pts, packet.is_keyframe) for packet in known.read(file, first, last)]
            if found != known.packets[["pos", "pts", "is_key"]][first : last + 1].tolist():
                raise TerminalError(ErrorCode.DECODE_FAILED, "The index of the video does not tell what is in it.")
    finally:
        file.close()


def _merged(ranges: Iterable[tuple[int, int]], near: int) -> list[tuple[int, int]]:
    """Ranges in ascending order, with those made one that overlap or have no more than `near` between them."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start - merged[-1][1] <= near:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


# --- keyframes ---


def _survey_keyframes(file: VideoFile, max_gap_s: float | None) -> Survey | str:
    """The survey of a file of which keyframes are to be shown."""
    frame_index = frame_index_told(file)
    if frame_index is None:
        return "no times of frames"
    if max_gap_s is not None and frame_index.longest_keyframe_gap_s > max_gap_s:
        return "few keyframes"
    return _places(file, frame_index) or "no place of a keyframe"


def _keyframe_ranges(known: Survey, frames: list[int], have: Sequence[Range]) -> list[tuple[int, int]]:
    """Where the keyframes nearest to some frames lie, and the first."""
    places = np.union1d(known.frame_index.keyframes_near(sorted(set(frames))), [0])
    starts, ends = known.starts[places], _ends(known, places, have)
    return _merged(zip(starts.tolist(), ends, strict=True), -1)  # heads of small clusters, or two keyframes in one


def _ends(known: Survey, places: NDArray[np.int64], have: Sequence[Range]) -> list[int]:
    """Where some keyframes end; for one in a cluster of which nothing is known yet, where the head of that ends."""
    if known.ends is not None:
        return known.ends[places].tolist()
    file = VideoFile(known.path, is_brief=True)
    try:
        file.cues()
        ends = []
        for start, pts in zip(known.starts[places].tolist(), known.frame_index.seek_pts[places].tolist(), strict=True):
            filled = _filled(have, start)
            end = file.end_of_keyframe(pts) if filled else None
            ends.append(min(end or start + max(known.head_bytes, 2 * filled), file.size_bytes))
    finally:
        file.close()
    return ends


def _places(file: VideoFile, frame_index: FrameIndex) -> Survey | None:
    """Where the keyframes lie."""
    if file.stream.index_entries and file.frame_index_from_samples() is not None:
        entries = list(file.stream.index_entries)
        keys = [entries[number] for number in frame_index.keyframes]
        starts = np.array([entry.pos for entry in keys], dtype=np.int64)
        ends = starts + np.array([entry.size for entry in keys], dtype=np.int64)
        return Survey(file.path, frame_index, starts, ends, 0)
    if (exact := survey_exactly(file)) is not None:
        packets = exact.packets[_key_places(exact.packets, frame_index)]
        return Survey(file.path, frame_index, packets["pos"], packets["pos"] + packets["size"], 0)
    cues = file.cues()
    if list(cues) != frame_index.seek_pts.tolist():
        return None
    rate = file.size_bytes / frame_index.duration_s
    head_bytes = round(min(max(rate * _HEADS_S, _HEAD_BYTES[0]), _HEAD_BYTES[1]))
    return Survey(file.path, frame_index, np.array(list(cues.values()), dtype=np.int64), None, head_bytes)


def _key_places(packets: NDArray[np.void], frame_index: FrameIndex) -> NDArray[np.int64]:
    """Which packets the keyframes are."""
    keys = np.flatnonzero(packets["is_key"] & ~packets["is_discard"])
    keys = keys[np.argsort(packets["pts"][keys], kind="stable")]
    return keys[np.searchsorted(packets["pts"][keys], frame_index.seek_pts)]


def _filled(have: Sequence[Range], start: int) -> int:
    """How many bytes from there on are filled in."""
    return next((have_end - start for have_start, have_end in have if have_start <= start < have_end), 0)


_SURVEYED: dict[str, Survey | ExactSurvey] = {}  # by path: of the files surveyed last
