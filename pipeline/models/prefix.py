"""A video's prefix: the rows that a language model is given of a video, and what it sees the video through.

Shape letters: N prefix rows, S segments, C tower channels.
"""

# ruff: noqa: N806 - tensors are named by their shape

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from longvlm.pipeline.vision.tokens import VideoTokens


@dataclass(frozen=True)
class Sight:
    """What a model sees a video through: what an index made for it must hold. Known from its config alone."""

    tower: str  # the vision tower whose tokens it reads: a folder or hub id
    feature_layer: int  # hidden state of the tower that its projector reads, as IndexRecipe.feature_layer
    num_global_tokens: int  # rows at the head of the prefix that its projector was trained on
    num_marker_tokens: int = 0  # beside each segment's in its prompts, at most


@dataclass(frozen=True)
class SegmentTimes:
    """Where the segments of a prefix lie, and when in the video each began."""

    num_global: int  # rows before the first segment's
    counts: tuple[int, ...]  # S: local rows of each segment
    starts_s: tuple[float, ...]  # S: when it began

    def __post_init__(self) -> None:
        """Every segment has rows and a time."""
        if len(self.counts) != len(self.starts_s) or self.num_global < 0 or min(self.counts, default=0) < 1:
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
    times: SegmentTimes | None = None  # for models whose prompts say when each segment began

    def __post_init__(self) -> None:
        """The times are those of these rows."""
        if self.times is not None and self.times.num_rows != len(self.rows):
            raise ValueError(f"times of {self.times.num_rows} rows were given for {len(self.rows)}")

    def __repr__(self) -> str:
        return f"VideoPrefix(rows={list(self.rows.shape)}, num_whole_frames={self.num_whole_frames}, {self.times})"


def prefix_of(video: VideoTokens, segments: Sequence[Mapping[str, Any]], sight: Sight) -> VideoPrefix:
    """The prefix of a video, also after a budget has joined or left out some of its segments.

    A model that reads no global tokens is given none; one that reads some pools no frame's patches.

    Args:
        video: within its budget.
        segments: the video's rows of the table `segments` (start_s, first_frame), in time order.
        sight: what the model sees it through.
    """
    with_global = sight.num_global_tokens > 0
    rows_NC = video.prefix(with_global=with_global)
    times = SegmentTimes(len(rows_NC) - len(video.local), video.counts, _starts_s(video, segments))
    return VideoPrefix(rows_NC, None if with_global else video.num_whole_frames, times)


def _starts_s(video: VideoTokens, segments: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """When each segment began: the stored one in which its first frame lies."""
    counts = np.array(video.counts, dtype=np.int64)
    first_frame_S = np.minimum.reduceat(video.spans[:, 0].numpy(), np.cumsum(counts) - counts)
    stored = np.searchsorted([segment["first_frame"] for segment in segments], first_frame_S, side="right") - 1
    return tuple(float(segments[i]["start_s"]) for i in np.maximum(stored, 0).tolist())
