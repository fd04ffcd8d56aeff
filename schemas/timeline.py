"""Frames, segments and work units on a video's time axis.

Frame numbers are integers counted from 0 in display order. Seconds are floats from the first frame on; spans are
half-open, `[start_s, end_s)`. When each frame is shown, `pipeline/decode/times.py` says.
"""

from dataclasses import dataclass, replace

MAX_UNIT_FRAMES = 100  # what is decoded, encoded and handed on at a time: 15 MB of 224 px RGB


@dataclass(frozen=True)
class VideoInfo:
    """What the container and the decoder say about a video, after rotation is applied."""

    num_frames: int
    fps: float
    duration_s: float
    width: int
    height: int
    codec: str
    decoder: str  # "pyav" or "pyav-keyframes"; of early versions "decord"

    def __post_init__(self) -> None:
        """A video that passes here can be sampled: it has frames and a positive length."""
        if self.num_frames < 1 or self.duration_s <= 0 or self.fps <= 0:
            raise ValueError(f"not a playable video: {self}")


@dataclass(frozen=True)
class Segment:
    """A short span of a video and the frames that stand for it, in time order (a frame may repeat)."""

    index: int
    start_s: float
    end_s: float
    frames: tuple[int, ...]

    def __post_init__(self) -> None:
        """A segment has a length, and frames that do not go back in time."""
        if not self.frames or self.end_s <= self.start_s or list(self.frames) != sorted(self.frames):
            raise ValueError(f"not a segment: {self}")

    @property
    def num_frames(self) -> int:
        """How many frames stand for the segment, repeats counted."""
        return len(self.frames)

    def showing(self, frames: tuple[int, ...], start_s: float, end_s: float) -> "Segment":
        """The same segment with the frames that were really decoded, its bounds widened to hold their time."""
        return replace(self, frames=frames, start_s=min(self.start_s, start_s), end_s=max(self.end_s, end_s))


def cut_into_units(segments: list[Segment], max_frames: int = MAX_UNIT_FRAMES) -> list[list[Segment]]:
    """Group consecutive whole segments into work units of at most `max_frames` frames (one segment at least)."""
    units: list[list[Segment]] = []
    room = 0
    for segment in segments:
        if not units or segment.num_frames > room:
            units.append([])
            room = max_frames
        units[-1].append(segment)
        room -= segment.num_frames
    return units
