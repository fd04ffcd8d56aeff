import numpy as np
import pytest

from longvlm.pipeline.decode.times import TimedVideo, nearest_indices

S = 1_000_000_000


def timed(times_s, duration_s):
    times_ns = np.array([round(time_s * S) for time_s in times_s])
    return TimedVideo(len(times_s), 1.0, duration_s, 64, 48, "h264", "pyav", times_ns)


def test_the_frame_at_a_time_is_the_last_that_has_begun():
    video = timed([0, 0.5, 5, 60], 65)
    moments = {-1: 0, 0: 0, 0.4999: 0, 0.5: 1, 4.9: 1, 5: 2, 59.9: 2, 60: 3, 1000: 3}
    assert {moment: video.frame_at(moment) for moment in moments} == moments


def test_the_time_of_a_number_goes_through_the_stamps():
    video = timed([0, 0.5, 5, 60], 65)
    assert [video.time_of(number) for number in range(5)] == [0, 0.5, 5, 60, 65]
    assert [video.time_of(number) for number in (0.5, 1.5, 3.5)] == [0.25, 2.75, 62.5]


@pytest.mark.parametrize(
    ("times_s", "duration_s"), [([0, 1, 1], 3), ([0, 2, 1], 3), ([1, 2], 3), ([0, 3], 3), ([0, 4], 3)]
)
def test_times_ascend_within_the_video(times_s, duration_s):
    with pytest.raises(ValueError, match="frames"):
        timed(times_s, duration_s)


def test_the_nearest_is_the_closest_and_the_earlier_of_two():
    assert nearest_indices(np.array([0, 10, 20]), np.array([0, 4, 5, 6, 15, 16, 99])).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert nearest_indices(np.array([7]), np.array([0, 7, 9])).tolist() == [0, 0, 0]
