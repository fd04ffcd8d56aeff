"""The frame index of a video: how many frames it has, when each is shown, and where decoding can begin.

Made of the stamps of a container's packets, which have to be understood first: some are hidden by an edit list, some
clocks start again in the middle of a file, and some containers stamp packets in the order of decoding.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.times import MAX_FRAMES, NS, nearest_indices
from longvlm.schemas.errors import ErrorCode, TerminalError

PACKET = np.dtype(  # a packet, in file order; stamps and duration in ticks of the stream, NaN where unknown
    [("pts", "f8"), ("dts", "f8"), ("duration", "f8"), ("is_key", "?"), ("is_discard", "?")]
)
# Where a clock may jump, a longer gap between frames is a jump, unless the stamps speak of a picture that stays.
_LONGEST_STILL_S = 600.0
_LONGEST_DELAY_S = 10.0  # from decoding to showing: ISO/IEC 13818-1 allows no more, but for stills
_MAX_UNORDERED_S = 0.1  # by which decoding times may go back without the clock having started again


@dataclass(frozen=True)
class FrameIndex:
    """The frame index of a stream: its N frames in display order, and the K keyframes among them."""

    times_ns: NDArray[np.int64]  # [N] when each is shown, ascending from 0
    duration_s: float
    keyframes: NDArray[np.int64]  # [K] frame numbers, ascending
    seek_pts: NDArray[np.int64]  # [K] when each is shown: where to seek for it, in the stream's time base
    start_pts: int = 0  # where to seek for the first frame: a keyframe before it may be hidden
    pts: NDArray[np.int64] | None = None  # [N] by which decoded frames are told apart; None: they are counted
    stamps: NDArray[np.int64] | None = None  # [packets] what stands for each one's pts, where the clock jumps
    has_closed_gops: bool = False  # nothing is hidden, nor shown before the keyframe that it follows in the file

    @property
    def num_frames(self) -> int:
        """N."""
        return len(self.times_ns)

    def frame_at_pts(self, pts: int) -> int:
        """The number of the frame shown at a presentation time stamp; -1 before the first."""
        assert self.pts is not None
        return int(np.searchsorted(self.pts, pts, side="right")) - 1

    def keyframes_near(self, frames: list[int]) -> NDArray[np.int64]:
        """The place among the keyframes of that which is nearest in time to each frame."""
        return nearest_indices(self.times_ns[self.keyframes], self.times_ns[frames])

    @property
    def longest_keyframe_gap_s(self) -> float:
        """The longest stretch of the video without a keyframe."""
        edges = np.concatenate([[0], self.times_ns[self.keyframes], [round(self.duration_s * NS)]])
        return float(np.diff(edges).max()) / NS


def index_packets(packets: NDArray[np.void], time_base: Fraction, header_fps: float, *, jumps: bool) -> FrameIndex:
    """The frame index of a stream whose packets have presentation stamps.

    Args:
        packets: [P] of `PACKET`, at least one that is shown, all with pts.
        time_base: seconds a tick.
        header_fps: what a single frame without a duration lasts.
        jumps: whether the container's clock may start again or jump.

    Raises:
        TerminalError: (decode_failed) most of it comes before the first keyframe.
    """
    offsets = clock_offsets(packets, float(time_base)) if jumps else None
    stamps = packets["pts"].astype(np.int64) if offsets is None else (packets["pts"] + offsets).astype(np.int64)
    is_key, is_shown = packets["is_key"], ~packets["is_discard"]
    if not is_key.any():
        is_key = np.arange(len(packets)) == 0
    start = stamps[is_key].min()  # before the first keyframe nothing can be shown
    visible = stamps[is_shown]
    pts = np.unique(visible[visible >= start])
    if len(visible) - len(pts) > len(visible) // 2:
        raise TerminalError(
            ErrorCode.DECODE_FAILED,
            f"The video has no keyframe among its first {len(visible) - len(pts)} of {len(visible)} frames, so most "
            "of it cannot be shown; cut or transcode it anew.",
        )
    key_pts = np.unique(stamps[is_key & is_shown])
    span = float(pts[-1] - pts[0])  # in ticks: whole, so exact
    last = float(packets["duration"][is_shown][visible.argmax()]) or span / max(len(pts) - 1, 1)
    follows_key = stamps >= np.maximum.accumulate(np.where(is_key, stamps, stamps.min()))
    if not len(key_pts):  # an edit list hides the only one
        key_pts = pts[:1]
    return FrameIndex(
        times_ns=nanoseconds(pts, time_base),
        duration_s=(span + last) * float(time_base) or 1 / header_fps,
        keyframes=np.searchsorted(pts, key_pts),
        seek_pts=key_pts,
        start_pts=int(start),
        pts=pts,
        stamps=None if offsets is None else stamps,
        has_closed_gops=bool(is_shown.all() and offsets is None and follows_key.all()),
    )


def index_in_order(packets: NDArray[np.void], time_base: Fraction, header_fps: float) -> FrameIndex:
    """The frame index of a stream whose packets are stamped in the order of decoding, or not at all.

    Decoded frames are counted then: the n-th is shown at the n-th stamp, or where some lack one, in even steps.
    """
    packets = packets[~packets["is_discard"]]
    num_frames, is_key = len(packets), packets["is_key"]
    clock = np.where(np.isnan(packets["dts"]), packets["pts"], packets["dts"])
    ticks = np.unique(clock)  # NaN once, at the end
    if len(ticks) < num_frames or np.isnan(ticks[-1]):
        times_ns, duration_s = even_times(num_frames, num_frames / header_fps), num_frames / header_fps
    else:
        span = float(ticks[-1] - ticks[0])
        last = float(packets["duration"][-1]) or span / max(num_frames - 1, 1)
        times_ns = nanoseconds(ticks.astype(np.int64), time_base)
        duration_s = (span + last) * float(time_base) or 1 / header_fps
    keyframes = np.flatnonzero(is_key) if is_key.any() else np.zeros(1, dtype=np.int64)
    return FrameIndex(times_ns, duration_s, keyframes, np.zeros_like(keyframes))


def clock_offsets(packets: NDArray[np.void], seconds_a_tick: float) -> NDArray[np.float64] | None:
    """What to add to each packet's stamps for one timeline in file order; None where the clock never jumped.

    A clock that goes back has started again. One that goes far ahead has jumped, unless the frame before is said to
    last that long, or stamps of decoding and of showing lie as far apart as only a picture that stays takes them.
    """
    clock = np.where(np.isnan(packets["dts"]), packets["pts"], packets["dts"])
    steps, durations = np.diff(clock), packets["duration"][:-1]
    starts_again = steps < -_MAX_UNORDERED_S / seconds_a_tick
    is_late = packets["pts"] - clock <= _LONGEST_DELAY_S / seconds_a_tick
    jumped = steps > np.maximum(_LONGEST_STILL_S / seconds_a_tick, 2 * durations)
    breaks = starts_again | (jumped & is_late[:-1] & is_late[1:] & (np.diff(packets["pts"]) > steps / 2))
    if not breaks.any():
        return None
    forward = steps[~breaks & (steps > 0)]
    usual = float(np.median(forward)) if len(forward) else 1.0
    shifts = np.zeros(len(packets))
    shifts[1:][breaks] = (np.where(durations > 0, durations, usual) - steps)[breaks]
    return np.cumsum(shifts)


def index_between_keyframes(
    key_pts: NDArray[np.int64], end_pts: float, time_base: Fraction, fps: float
) -> FrameIndex | None:
    """The frame index of a stream of which only the keyframes' times are known: frames in between lie evenly.

    Args:
        key_pts: [K] ascending, in ticks; the first frame is a keyframe.
        end_pts: when the last frame ends, in ticks.
        time_base: seconds a tick.
        fps: frames a second between two keyframes, of which there is at least the first one.
    """
    ends_ns = nanoseconds(np.append(key_pts, max(round(end_pts), int(key_pts[-1]) + 1)), time_base)
    gaps_ns = np.diff(ends_ns)
    numbers = np.maximum(np.rint(gaps_ns * (fps / NS)), 1).astype(np.int64)
    if numbers.sum() > MAX_FRAMES or (numbers > gaps_ns).any():
        return None
    keyframes = np.append(0, np.cumsum(numbers)[:-1])
    places = np.arange(numbers.sum()) - np.repeat(keyframes, numbers)
    times_ns = np.repeat(ends_ns[:-1], numbers) + (places * np.repeat(gaps_ns / numbers, numbers)).astype(np.int64)
    return FrameIndex(
        times_ns=times_ns,
        duration_s=float(ends_ns[-1]) / NS,
        keyframes=keyframes,
        seek_pts=key_pts,
        start_pts=int(key_pts[0]),
    )


def nanoseconds(ticks: NDArray[np.int64], time_base: Fraction) -> NDArray[np.int64]:
    """Ascending stamps as nanoseconds from the first, ascending too whatever rounding does."""
    times = np.rint((ticks - ticks[0]) * (time_base.numerator * NS / time_base.denominator)).astype(np.int64)
    places = np.arange(len(times))
    return np.maximum.accumulate(times - places) + places


def even_times(num_frames: int, duration_s: float) -> NDArray[np.int64]:
    """The times of frames at a constant rate, in nanoseconds."""
    return np.rint(np.arange(num_frames) * (duration_s * NS / num_frames)).astype(np.int64)
