"""Frame sampling: uniform over a video as the reference does it, or in segments of fixed length."""

import math

import numpy as np

from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.timeline import Segment, VideoInfo

_ROUNDING = 1e-9  # slots: a length that is whole but for the last bits of a float counts as whole


def uniform_indices(total: int, wanted: int) -> list[int]:
    """`min(total, wanted)` frame numbers out of `total`: midpoints of rounded edges (LONGVLM.md section 2).

    Rounding is half to even, in float64. The last frame is never forced in, and short videos may repeat a frame.

    Raises:
        ValueError: there is nothing to sample from, or nothing wanted.
    """
    if total < 1 or wanted < 1:
        raise ValueError(f"cannot sample {wanted} of {total} frames")
    num = min(total, wanted)
    edges = np.round((total - 1) / num * np.arange(num + 1)).astype(np.int64)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def upsample_positions(n: int, wanted: int) -> list[int]:
    """Which of `n` sampled frames stands at each of `wanted` places: nearest, floor(k * float32(n / wanted)).

    LONGVLM.md section 2, short videos, in the order that the reference intended.
    """
    scale = np.float32(n) / np.float32(wanted)
    positions = np.floor(np.arange(wanted, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(positions, n - 1).tolist()


def plan_segments(recipe: IndexRecipe, video: VideoInfo) -> list[Segment]:
    """The segments of a video under a recipe, in time order, at least one; together they cover the whole video."""
    return _uniform(recipe, video) if recipe.num_segments else _interval(recipe, video)


def _uniform(recipe: IndexRecipe, video: VideoInfo) -> list[Segment]:
    """`num_segments` equal spans that share out the sampled frames in order; short videos are up-sampled."""
    assert recipe.num_segments is not None
    num_segments, per_segment = recipe.num_segments, recipe.frames_per_segment
    sampled = uniform_indices(video.num_frames, num_segments * per_segment)
    frames = [sampled[position] for position in upsample_positions(len(sampled), num_segments * per_segment)]
    return [
        Segment(
            index=index,
            start_s=video.duration_s * index / num_segments,
            end_s=video.duration_s * (index + 1) / num_segments,
            frames=tuple(frames[index * per_segment : (index + 1) * per_segment]),
        )
        for index in range(num_segments)
    ]


def _interval(recipe: IndexRecipe, video: VideoInfo) -> list[Segment]:
    """A segment every `segment_s`, its frames at the centres of equal slots.

    The last segment may be shorter and keeps the frame rate; a tail shorter than half a slot only lengthens the
    segment before it.
    """
    assert recipe.segment_s is not None
    per_segment = recipe.frames_per_segment
    slot_s = recipe.segment_s / per_segment
    num_slots = video.duration_s / slot_s
    num_full = math.floor(num_slots / per_segment + _ROUNDING)
    tail_slots = num_slots - num_full * per_segment
    counts = [per_segment] * num_full
    if not counts or tail_slots >= 0.5:
        counts.append(max(1, math.ceil(tail_slots - _ROUNDING)))
    segments = []
    for index, num_frames in enumerate(counts):
        start_s = index * recipe.segment_s
        is_last = index == len(counts) - 1
        times_s = (start_s + (slot + 0.5) * slot_s for slot in range(num_frames))
        segments.append(
            Segment(
                index=index,
                start_s=start_s,
                end_s=video.duration_s if is_last else start_s + recipe.segment_s,
                frames=tuple(video.frame_at(time_s) for time_s in times_s),
            )
        )
    return segments
