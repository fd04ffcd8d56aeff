"""A video's prefix: the rows that a language model is given of a video.

Shape letters: N prefix rows, S segments, C tower channels.
"""

# ruff: noqa: N806 - tensors are named by their shape

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.vision.tokens import VideoTokens


@dataclass(frozen=True)
class SegmentTimes:
    """Where the segments of a prefix lie, and when in the video each began."""

    num_global: int  # rows before the first segment's
    counts: tuple[int, ...]  # S: local rows of each segment
    starts_s: tuple[float, ...]  # S: when it began
    ends_s: tuple[float, ...]  # S: and ended

    def __post_init__(self) -> None:
        """Every segment has rows and a time."""
        if (
            not len(self.counts) == len(self.starts_s) == len(self.ends_s)
            or self.num_global < 0
            or min(self.counts, default=0) < 1
        ):
            raise ValueError(f"segments need a row and a time each: {self}")

    @property
    def num_rows(self) -> int:
        """Rows of the prefix, N."""
        return self.num_global + sum(self.counts)


@dataclass(frozen=True, eq=False, repr=False)
class VideoPrefix:
    """A video as a projector is given it: its tokens, global first, then local in time order."""

    rows: Tensor  # [N, C], as stored, before projection
    num_whole_frames: int | None = None  # of how many frames the local rows are all the patches; None once merged
    times: SegmentTimes | None = None  # for models whose prompts say when segments were
    positions: Tensor | None = None  # [N, 3] float64: seconds, row and column of each, where no row is global
    patch_grid: tuple[int, int] | None = None  # of the tower: rows and columns of a picture's patch tokens

    def __post_init__(self) -> None:
        """The times and positions are those of these rows."""
        if self.times is not None and self.times.num_rows != len(self.rows):
            raise ValueError(f"times of {self.times.num_rows} rows were given for {len(self.rows)}")
        if self.positions is not None and self.positions.shape != (len(self.rows), 3):
            raise ValueError(f"positions {list(self.positions.shape)} were given for {len(self.rows)} rows")

    def __repr__(self) -> str:
        return f"VideoPrefix(rows={list(self.rows.shape)}, num_whole_frames={self.num_whole_frames}, {self.times})"


def prefix_of(video: VideoTokens, segments: Sequence[Mapping[str, Any]], sight: Sight) -> VideoPrefix:
    """The prefix of a video, also after a budget has joined or left out some of its segments.

    A model that reads no global tokens is given none; one that reads some pools no frame's patches.

    Args:
        video: within its budget.
        segments: the video's rows of the table `segments` (start_s, end_s, first_frame), in time order.
        sight: what the model sees it through.
    """
    with_global = sight.num_global_tokens > 0
    rows_NC = video.prefix(with_global=with_global)
    times = SegmentTimes(len(rows_NC) - len(video.local), video.counts, *_when(video, segments))
    if with_global:
        return VideoPrefix(rows_NC, None, times)
    return VideoPrefix(rows_NC, video.num_whole_frames, times, video.positions, sight.patch_grid)


def _when(video: VideoTokens, segments: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """When each segment began and ended: the stored ones in which its first and last frames lie."""
    counts = np.array(video.counts, dtype=np.int64)
    starts = np.cumsum(counts) - counts
    first_frame_S = np.minimum.reduceat(video.spans[:, 0].numpy(), starts)
    last_frame_S = np.maximum.reduceat(video.spans[:, 1].numpy(), starts)
    begins = [segment["first_frame"] for segment in segments]
    first_S, last_S = (
        np.maximum(np.searchsorted(begins, frame_S, side="right") - 1, 0).tolist()
        for frame_S in (first_frame_S, last_frame_S)
    )
    return (
        tuple(float(segments[i]["start_s"]) for i in first_S),
        tuple(float(segments[i]["end_s"]) for i in last_S),
    )
