"""Frame sampling: uniform over a video as the reference does it, in segments of fixed length, or spread over it."""

import math

import numpy as np

from longvlm.pipeline.decode.times import NS, TimedVideo
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.timeline import Segment, cut_into_units

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


def plan_segments(recipe: IndexRecipe, video: TimedVideo) -> list[Segment]:
    """The segments of a video under a recipe, in time order, at least one; together they cover the whole video."""
    plan = {"uniform": _uniform, "interval": _interval, "spread": _spread}[recipe.sampling]
    return plan(recipe, video)


def plan_units(recipe: IndexRecipe, video: TimedVideo) -> list[list[Segment]]:
    """The work units of a video under a recipe: its segments in groups, in time order."""
    return cut_into_units(plan_segments(recipe, video))


def _uniform(recipe: IndexRecipe, video: TimedVideo) -> list[Segment]:
    """`num_segments` spans of equally many frames that share out the sampled ones in order, as the reference samples.

    It counts frames and knows no time; spans begin and end when their frames do. Short videos are up-sampled.
    """
    assert recipe.num_segments is not None
    num_segments, per_segment = recipe.num_segments, recipe.frames_per_segment
    sampled = uniform_indices(video.num_frames, num_segments * per_segment)
    frames = [sampled[position] for position in upsample_positions(len(sampled), num_segments * per_segment)]
    return [
        Segment(
            index=index,
            start_s=video.time_of(video.num_frames * index / num_segments),
            end_s=video.time_of(video.num_frames * (index + 1) / num_segments),
            frames=tuple(frames[index * per_segment : (index + 1) * per_segment]),
        )
        for index in range(num_segments)
    ]


def _interval(recipe: IndexRecipe, video: TimedVideo) -> list[Segment]:
    """A segment every `segment_s`, its frames those shown at the centres of equal slots.

    There are no more segments than frames: where an interval holds no frame of its own, what was there before is still
    shown, and the segment before stretches over it. The last segment may be shorter and keeps the frame rate; a tail
    shorter than half a slot only lengthens the segment before it.
    """
    assert recipe.segment_s is not None
    per_segment = recipe.frames_per_segment
    slot_s = recipe.segment_s / per_segment
    num_slots = video.duration_s / slot_s
    num_full = math.floor(num_slots / per_segment + _ROUNDING)
    tail_slots = num_slots - num_full * per_segment
    has_tail = not num_full or tail_slots >= 0.5
    last = num_full if has_tail else num_full - 1
    intervals = np.unique(np.minimum(video.times_ns // (recipe.segment_s * NS), last)).astype(np.int64).tolist()
    segments = []
    for index, interval in enumerate(intervals):
        start_s = interval * recipe.segment_s
        is_tail = has_tail and interval == last
        num_frames = max(1, math.ceil(tail_slots - _ROUNDING)) if is_tail else per_segment
        times_s = (start_s + (slot + 0.5) * slot_s for slot in range(num_frames))
        segments.append(
            Segment(
                index=index,
                start_s=start_s,
                end_s=intervals[index + 1] * recipe.segment_s if interval != intervals[-1] else video.duration_s,
                frames=tuple(video.frame_at(time_s) for time_s in times_s),
            )
        )
    return segments


def _spread(recipe: IndexRecipe, video: TimedVideo) -> list[Segment]:
    """Segments of `frames_per_segment` sampled frames in a row; the last one may have fewer.

    They begin when their first frames do, but the first one with the video; the last one ends with it.
    """
    frames, per_segment = spread_indices(recipe, video), recipe.frames_per_segment
    parts = [tuple(frames[first : first + per_segment]) for first in range(0, len(frames), per_segment)]
    bounds_s = [0.0, *(video.time_of(part[0]) for part in parts[1:]), video.duration_s]
    return [Segment(index, bounds_s[index], bounds_s[index + 1], part) for index, part in enumerate(parts)]


def spread_indices(recipe: IndexRecipe, video: TimedVideo) -> list[int]:
    """Ascending frame numbers: `frames_per_s`, but at most `max_frames`, evenly from a first frame to a last one.

    These are the video's own, or where it is long those `skip_ends_s` from its ends. What counts as long is the rule of
    the models that are fed so, down to its units: more seconds than `max_frames` times `frames_per_s`.
    """
    assert recipe.max_frames is not None
    assert recipe.frames_per_s is not None
    first, last = 0, video.num_frames - 1
    skip_s = recipe.skip_ends_s
    if skip_s and video.duration_s - 2 * skip_s > recipe.max_frames * recipe.frames_per_s:
        skipped_to, skipped_from = int(skip_s * video.fps), int(video.num_frames - skip_s * video.fps)
        if skipped_to < min(skipped_from, last):
            first, last = skipped_to, min(skipped_from, last)
    wanted = min(round(recipe.frames_per_s * video.duration_s), recipe.max_frames)
    num = max(1, min(wanted, last - first + 1))  # with as many as there are, each is there once
    return np.unique(np.linspace(first, last, num, dtype=np.int64)).tolist()
