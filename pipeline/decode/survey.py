"""What of a video's file is needed to show some frames of it, told by the file's own index alone.

A remote object need not be fetched whole then: these functions run in the decoder's child over a sparse copy, in which
there is no more than that index yet, and name the byte ranges that are to be filled in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.frame_index import FrameIndex, index_packets
from longvlm.pipeline.decode.sample_table import sample_packets
from longvlm.pipeline.decode.times import TimedVideo

_MOST_SURVEYED = 4  # a worker fetches two at a time
_HEADS_S = 0.25  # of a Matroska's cluster, this much is read to find out how long its keyframe is ...
_HEAD_BYTES = (16 << 10, 256 << 10)  # ... within these bounds

Range = Sequence[int]  # start and end, bytes


@dataclass(frozen=True)
class Survey:
    """What is known of a file by its index: its frames, and where the keyframes lie in it."""

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
        return exact_index_told(brief) or brief.frame_index_from_cues()
    finally:
        brief.close()


def exact_index_told(file: VideoFile) -> FrameIndex | None:
    """The frame index that all packets of an MP4 give, told by its sample table; None where that does not do."""
    packets = sample_packets(file)
    return None if packets is None else index_packets(packets, file.stream.time_base, file.header_fps, jumps=False)


def survey(path: str, max_gap_s: float | None) -> TimedVideo | str:
    """Survey a file of which the index is there: its frames, or in a word why its keyframes will not do.

    The size of its pictures is the stored one, not yet turned.
    """
    _SURVEYED.pop(path, None)
    file = VideoFile(path, is_brief=True)
    try:
        if file.fields is not None:
            return "interlaced"
        frame_index = frame_index_told(file)
        if frame_index is None:
            return "no times of frames"
        if max_gap_s is not None and frame_index.longest_keyframe_gap_s > max_gap_s:
            return "few keyframes"
        places = _places(file, frame_index)
        if places is None:
            return "no place of a keyframe"
        while len(_SURVEYED) >= _MOST_SURVEYED:
            _SURVEYED.pop(next(iter(_SURVEYED)))
        _SURVEYED[path] = places
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
    """Which bytes of a surveyed file are needed to show the keyframes nearest to some frames, and the first.

    Args:
        path: of one of the files that were surveyed last.
        frames: by number.
        have: the ranges that are filled in, ascending and apart. Of a Matroska, more may be needed once these are.
    """
    known = _SURVEYED[path]
    places = np.union1d(known.frame_index.keyframes_near(sorted(set(frames))), [0])
    starts, ends = known.starts[places], _ends(known, places, have)
    wanted: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts.tolist(), ends, strict=True)):
        if wanted and wanted[-1][1] > start:  # heads of small clusters, or two keyframes in one cluster
            wanted[-1] = (wanted[-1][0], max(wanted[-1][1], end))
        else:
            wanted.append((start, end))
    return [(start, end) for start, end in wanted if _filled(have, start) < end - start]


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
    if (packets := sample_packets(file)) is not None:
        places = _key_places(packets, frame_index)
        starts = packets["pos"][places]
        return Survey(file.path, frame_index, starts, starts + packets["size"][places], 0)
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


_SURVEYED: dict[str, Survey] = {}  # by path: of the files surveyed last
