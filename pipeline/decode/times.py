"""When the frames of a video are shown: presentation times, on which the pictures at a time depend.

They are nanoseconds from the first frame, so that moments which containers can write exactly (half a second, say) are
compared exactly. They live here and not in `schemas`, which knows no numpy.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from longvlm.schemas.timeline import VideoInfo

NS = 1e9  # nanoseconds in a second
MAX_FRAMES = 1 << 24  # of a video: 77 hours at 60 a second; their times are 134 MB


@dataclass(frozen=True, eq=False)
class TimedVideo(VideoInfo):
    """What is known of a video, with the time of each of its frames."""

    times_ns: NDArray[np.int64]  # [num_frames], ascending from 0

    def __post_init__(self) -> None:
        """There is a time for every frame, each later than the one before, and the video lasts beyond the last."""
        super().__post_init__()
        if self.times_ns.shape != (self.num_frames,) or self.times_ns[0] != 0:
            raise ValueError(f"{self.times_ns.shape} times, the first not 0, for {self.num_frames} frames")
        if not (np.diff(self.times_ns) > 0).all() or self.times_ns[-1] >= self.duration_s * NS:
            raise ValueError("times of frames that do not ascend within the video")

    @property
    def facts(self) -> dict[str, int | float | str]:
        """The fields of VideoInfo alone."""
        return {field.name: getattr(self, field.name) for field in fields(VideoInfo)}

    def frame_at(self, time_s: float) -> int:
        """The frame shown at a time, the last that begins by then; times before the video give its first frame."""
        return max(int(np.searchsorted(self.times_ns, round(time_s * NS), side="right")) - 1, 0)

    def time_of(self, number: float) -> float:
        """When a frame is shown, in seconds; between two numbers the share of the way, after the last the end."""
        frame = math.floor(number)
        if frame >= self.num_frames:
            return self.duration_s
        start_s = float(self.times_ns[frame]) / NS
        return start_s + (number - frame) * (self.time_of(frame + 1) - start_s) if number > frame else start_s


def nearest_indices(ascending: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each wanted value, the place of the closest of `ascending`; the earlier of two equally close."""
    right = np.clip(np.searchsorted(ascending, wanted), 1, max(len(ascending) - 1, 1))
    right = np.minimum(right, len(ascending) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - ascending[left] <= ascending[right] - wanted, left, right)
