from fractions import Fraction

import numpy as np
import pytest

from longvlm.pipeline.decode.frame_index import PACKET, clock_offsets, index_in_order, index_packets, nanoseconds
from longvlm.schemas.errors import TerminalError

TICK = Fraction(1, 25)
NONE = np.nan
HOUR = 90_000


def packets(pts, *, dts=None, durations=1, keys=(0,), hidden=()):
    made = np.zeros(len(pts), dtype=PACKET)
    made["pts"], made["dts"], made["duration"] = pts, pts if dts is None else dts, durations
    made["is_key"][list(keys)], made["is_discard"][list(hidden)] = True, True
    return made


def index(made, *, jumps=True):
    return index_packets(made, TICK, 25.0, jumps=jumps)


def times(found):
    return (found.times_ns / 40_000_000).tolist()


def test_frames_are_counted_as_they_are_shown():
    found = index(packets([10, 13, 11, 12, 14], dts=[8, 9, 10, 11, 12], keys=(0, 4)))
    assert times(found) == [0, 1, 2, 3, 4]
    assert (found.keyframes.tolist(), found.seek_pts.tolist(), found.start_pts) == ([0, 4], [10, 14], 10)
    assert found.duration_s == pytest.approx(0.2)
    assert found.has_closed_gops
    assert [found.frame_at_pts(pts) for pts in (9, 10, 12, 99)] == [-1, 0, 2, 4]


def test_what_an_edit_list_hides_is_no_frame_but_may_be_where_decoding_begins():
    found = index(packets([-2, -1, 0, 1, 2, 3], keys=(0, 4), hidden=(0, 1)), jumps=False)
    assert times(found) == [0, 1, 2, 3]
    assert (found.keyframes.tolist(), found.start_pts, found.has_closed_gops) == ([2], -2, False)
    only = index(packets([-1, 0, 1], hidden=(0,)), jumps=False)
    assert (times(only), only.keyframes.tolist(), only.start_pts) == ([0, 1], [0], -1)


def test_a_clock_that_starts_again_goes_on_in_file_order():
    part = [3, 6, 4, 5, 7]
    found = index(packets(part * 3, dts=[1, 2, 3, 4, 5] * 3, keys=(0, 5, 10)))
    assert times(found) == list(range(15))
    assert found.keyframes.tolist() == [0, 5, 10]
    assert found.stamps is not None
    assert found.stamps.tolist() == [*part, *(pts + 5 for pts in part), *(pts + 10 for pts in part)]


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 20 * HOUR, -(1 << 33)])
def test_a_clock_that_jumps_goes_on(jump):
    pts = np.arange(100) + np.where(np.arange(100) < 50, 0, jump)
    assert times(index(packets(pts, keys=(0, 50)))) == list(range(100))
    assert len(set(times(index(packets(pts, keys=(0, 50), durations=0))))) == 100  # durations unknown


def test_several_jumps_are_one_timeline():
    pts = np.concatenate([np.arange(10), HOUR + np.arange(10), np.arange(10), 5 * HOUR + np.arange(10)])
    assert times(index(packets(pts, keys=range(0, 40, 10)))) == list(range(40))


def test_a_long_still_is_told_from_a_jump():
    still = 20 * 60 * 25
    shown = [0, still, 2 * still]
    assert times(index(packets(shown, durations=[still, still, 25]))) == shown  # the packet says how long it stays
    late = packets(shown, dts=[-still, 0, still])  # decoded long before it is shown
    assert times(index(late)) == shown
    assert times(index(packets([0, 1, 10_001, 10_002]))) == [0, 1, 10_001, 10_002]  # under ten minutes
    assert times(index(packets(shown), jumps=False)) == shown
    assert clock_offsets(packets(shown), 1 / 25) is not None


def test_reordered_frames_around_a_still_are_no_jump():
    still = 20 * 60 * 25
    made = packets([0, 3, 1, 2, still + 3, still + 1, still + 2], dts=[-2, -1, 0, 1, 2, 3, still + 1], keys=(0,))
    assert times(index(made)) == [0, 1, 2, 3, still + 1, still + 2, still + 3]


@pytest.mark.parametrize(
    ("pts", "dts", "expected"),
    [
        ([1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 2, 6, 7], [0, 1, 5, 6], [0, 1, 5, 6]),  # slots without a picture between them
        ([NONE] * 4, [0, 1, 5, 6], [0, 1, 5, 6]),
        ([NONE] * 4, [NONE] * 4, [0, 1, 2, 3]),
        ([NONE, 1, 2, 3], [NONE] * 4, [0, 1, 2, 3]),
    ],
)
def test_stamps_in_the_order_of_decoding_are_shown_in_that_order(pts, dts, expected):
    found = index_in_order(packets(pts, dts=dts, keys=(0, 2)), TICK, 25.0)
    assert times(found) == expected
    assert found.keyframes.tolist() == [0, 2]
    assert found.pts is None
    assert found.duration_s == pytest.approx((expected[-1] + 1) / 25)


def test_most_of_a_video_before_its_first_keyframe_is_a_failure():
    with pytest.raises(TerminalError, match="no keyframe among its first 6 of 10"):
        index(packets(range(10), keys=(6,)))


def test_gaps_between_keyframes_reach_to_both_ends():
    assert index(packets(range(100), keys=(0, 30, 60))).longest_keyframe_gap_s == pytest.approx(1.6)
    assert index(packets(range(100), keys=(0, 70))).longest_keyframe_gap_s == pytest.approx(2.8)


def test_times_ascend_whatever_rounding_does():
    assert nanoseconds(np.array([7, 8, 9, 11]), Fraction(1, 10**11)).tolist() == [0, 1, 2, 3]
    assert nanoseconds(np.array([0, 45_000]), Fraction(1, 90_000)).tolist() == [0, 500_000_000]
