import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_outputs import read_json

from longvlm.pipeline.decode.frame_index import even_times
from longvlm.pipeline.decode.sampling import plan_segments, spread_indices, uniform_indices, upsample_positions
from longvlm.pipeline.decode.times import TimedVideo
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.timeline import cut_into_units
from longvlm.schemas.tower import TowerSpec
from support import GOLDENS, missing

TOWER = TowerSpec("tower", "w", 4, (4, 4), 64, 56, has_cls=True, search_dim=None)


def uniform(num_segments=10, frames_per_segment=10):
    return IndexRecipe("u", TOWER, "uniform", frames_per_segment, 2, num_segments=num_segments)


def interval(segment_s=10.0, frames_per_segment=10):
    return IndexRecipe("i", TOWER, "interval", frames_per_segment, 2, segment_s=segment_s)


def spread(max_frames=64, frames_per_s=1.0, skip_ends_s=1.0, frames_per_segment=10):
    return IndexRecipe(
        *("s", TOWER, "spread", frames_per_segment, 2),
        max_frames=max_frames,
        frames_per_s=frames_per_s,
        skip_ends_s=skip_ends_s,
    )


def video(num_frames, duration_s):
    times_ns = even_times(num_frames, duration_s)
    return TimedVideo(num_frames, num_frames / duration_s, duration_s, 64, 48, "h264", "pyav", times_ns)


@pytest.mark.parity
def test_indices_are_the_references():
    for pair in read_json("sampling.json").get("pairs") or missing(GOLDENS, "pairs of frame counts"):
        indices = uniform_indices(pair["total"], pair["wanted"])
        assert indices == pair["indices"], pair["total"]
        assert len(indices) == pair["n_sampled"]


@pytest.mark.parity
def test_short_videos_are_upsampled_in_the_intended_order():
    name = "short_video_upsample_to_100"
    for case in read_json("sampling.json").get(name) or missing(GOLDENS, name):
        num_frames = len(case["resampled_frame_indices"])
        sampled = uniform_indices(case["total"], num_frames)
        assert sampled == case["sampled_indices"]
        positions = upsample_positions(len(sampled), num_frames)
        assert positions == case["upsample_source_position"]
        assert [sampled[position] for position in positions] == case["resampled_frame_indices"]


def test_rounding_is_half_to_even():
    assert uniform_indices(2, 1) == [0]  # edges 0 and 1
    assert uniform_indices(6, 2) == [1, 3]  # the edge at 2.5 goes to 2


@pytest.mark.parametrize(("total", "wanted"), [(0, 100), (100, 0)])
def test_nothing_to_sample_is_an_error(total, wanted):
    with pytest.raises(ValueError, match="cannot sample"):
        uniform_indices(total, wanted)


@given(st.integers(1, 5000), st.integers(1, 200))
def test_indices_ascend_within_the_video(total, wanted):
    indices = uniform_indices(total, wanted)
    assert len(indices) == min(total, wanted)
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < total


def test_uniform_segments_share_out_the_frames_and_the_time():
    segments = plan_segments(uniform(), video(250, 10.0))
    assert [frame for segment in segments for frame in segment.frames] == uniform_indices(250, 100)
    assert [segment.start_s for segment in segments] == [float(i) for i in range(10)]
    assert segments[-1].end_s == 10.0
    assert all(segment.num_frames == 10 for segment in segments)


def test_uniform_segments_of_a_short_video_are_full():
    segments = plan_segments(uniform(), video(1, 0.04))
    assert [segment.frames for segment in segments] == [(0,) * 10] * 10
    assert segments[3].start_s == pytest.approx(0.012)


def test_interval_frames_are_at_the_centres_of_equal_slots():
    segments = plan_segments(interval(), video(500, 20.0))  # 25 fps, a slot a second
    assert len(segments) == 2
    assert segments[0].frames == tuple(12 + 25 * i for i in range(10))
    assert segments[1].frames == tuple(262 + 25 * i for i in range(10))
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(0.0, 10.0), (10.0, 20.0)]


def at_times(times_s, duration_s):
    times_ns = np.array([round(time_s * 1e9) for time_s in times_s])
    return TimedVideo(len(times_s), len(times_s) / duration_s, duration_s, 64, 48, "h264", "pyav", times_ns)


def test_the_slot_at_a_time_shows_the_frame_that_has_begun():
    times_s = [*(i / 25 for i in range(125)), *range(5, 60, 5), *(60 + i / 25 for i in range(125))]
    segments = plan_segments(interval(), at_times(times_s, 65.0))
    assert [(segment.start_s, segment.end_s) for segment in segments] == [
        (0, 10), (10, 20), (20, 30), (30, 40), (40, 50), (50, 60), (60, 65)
    ]  # fmt: skip
    assert segments[0].frames == (12, 37, 62, 87, 112, *[125] * 5)
    assert segments[3].frames == (130,) * 5 + (131,) * 5  # of 30 and of 35 s
    assert segments[6].frames == (148, 173, 198, 223, 248)


def test_there_are_no_more_segments_than_frames():
    segments = plan_segments(interval(), at_times([0, 1200, 2400, 3599], 3600.0))
    assert [(segment.start_s, segment.end_s) for segment in segments] == [
        (0, 1200), (1200, 2400), (2400, 3590), (3590, 3600)
    ]  # fmt: skip
    assert [segment.frames for segment in segments] == [(0,) * 10, (1,) * 10, (2,) * 10, (2,) * 9 + (3,)]
    far_apart = at_times([599.0 * i for i in range(4000)], 599.0 * 4000)
    assert len(plan_segments(interval(), far_apart)) == 4000


def test_a_short_tail_with_the_last_frame_belongs_to_the_interval_before_it():
    segments = plan_segments(interval(), at_times([0, 40.1], 40.3))
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(0, 30), (30, 40.3)]
    assert segments[1].frames == (0,) * 10  # the frame of 40.1 s is shown at no centre


def test_uniform_sampling_counts_frames_and_tells_their_times():
    times_s = [*(i / 25 for i in range(50)), *(10 + i for i in range(50))]
    segments = plan_segments(uniform(4, 5), at_times(times_s, 60.0))
    assert [frame for segment in segments for frame in segment.frames] == uniform_indices(100, 20)
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(0, 1), (1, 10), (10, 35), (35, 60)]


@given(st.lists(st.floats(0.001, 500), max_size=60), st.floats(0.001, 100), st.sampled_from([0.5, 2.0, 10.0, 1 / 3]))
def test_segments_of_any_times_tile_the_video(gaps_s, last_s, segment_s):
    times_s = [0.0, *itertools.accumulate(gaps_s)]
    video = at_times(times_s, times_s[-1] + last_s)
    segments = plan_segments(interval(segment_s, 4), video)
    assert 1 <= len(segments) <= video.num_frames
    assert (segments[0].start_s, segments[-1].end_s) == (0.0, video.duration_s)
    assert all(left.end_s == right.start_s for left, right in itertools.pairwise(segments))
    for segment in segments:
        for slot, frame in enumerate(segment.frames):
            moment = segment.start_s + (slot + 0.5) * segment_s / 4
            assert frame == sum(time_ns <= round(moment * 1e9) for time_ns in video.times_ns.tolist()) - 1


@pytest.mark.parametrize(
    ("duration_s", "frames_per_segment", "last_end_s"),
    [
        (0.04, [1], 0.04),  # always one segment
        (0.6, [1], 0.6),
        (3.2, [4], 3.2),  # the frame rate is kept
        (10.0, [10], 10.0),
        (10.3, [10], 10.3),  # a tail below half a slot lengthens the segment before it
        (10.5, [10, 1], 10.5),
        (12.0, [10, 2], 12.0),
        (29.999999999, [10, 10, 10], 29.999999999),
    ],
)
def test_interval_tails(duration_s, frames_per_segment, last_end_s):
    segments = plan_segments(interval(), video(max(1, round(duration_s * 25)), duration_s))
    assert [segment.num_frames for segment in segments] == frames_per_segment
    assert segments[-1].end_s == last_end_s


@given(st.floats(0.001, 2_000), st.integers(1, 100_000), st.sampled_from([0.5, 2.0, 10.0]), st.integers(1, 16))
def test_interval_segments_tile_any_video(duration_s, num_frames, segment_s, frames_per_segment):
    info = video(num_frames, duration_s)
    segments = plan_segments(interval(segment_s, frames_per_segment), info)
    assert segments[0].start_s == 0.0
    assert segments[-1].end_s == duration_s
    assert [segment.index for segment in segments] == list(range(len(segments)))
    assert all(left.end_s == right.start_s for left, right in itertools.pairwise(segments))
    assert all(0 <= frame < num_frames for segment in segments for frame in segment.frames)
    assert all(segment.num_frames <= frames_per_segment for segment in segments)
    assert len(segments) <= math.ceil(duration_s / segment_s)
    units = cut_into_units(segments)
    assert [segment for unit in units for segment in unit] == segments


def test_spread_frames_go_from_the_first_to_the_last():
    assert spread_indices(spread(), video(250, 10.0)) == [0, 27, 55, 83, 110, 138, 166, 193, 221, 249]
    assert spread_indices(spread(frames_per_s=0.01, skip_ends_s=0), video(250, 10.0)) == [0]
    assert spread_indices(spread(frames_per_s=100), video(7, 0.28)) == list(range(7))
    assert spread_indices(spread(4, skip_ends_s=0), video(3000, 120.0)) == [0, 999, 1999, 2999]
    assert spread_indices(spread(4), video(3000, 120.0)) == [25, 1008, 1991, 2975]
    assert spread_indices(spread(4, frames_per_s=30), video(3000, 120.0))[0] == 0  # 118 s are less than 4 x 30
    assert spread_indices(spread(4, skip_ends_s=59), video(3000, 120.0)) == [0, 999, 1999, 2999]  # 2 s are left
    assert spread_indices(spread(1, 1, 59.9), video(120, 120.0)) == [0]


def test_spread_segments_share_out_the_frames_and_cover_the_video():
    times_s = [*(i / 25 for i in range(50)), *(2 + i for i in range(10))]
    segments = plan_segments(spread(7, frames_per_segment=3, skip_ends_s=0), at_times(times_s, 12.0))
    assert [segment.frames for segment in segments] == [(0, 9, 19), (29, 39, 49), (59,)]
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(0, 29 / 25), (29 / 25, 11), (11, 12)]


@given(st.integers(1, 20_000), st.sampled_from([1, 15, 25, 29.97, 60]), st.integers(1, 80), st.integers(1, 8))
def test_spread_segments_tile_any_video(num_frames, fps, max_frames, per_segment):
    info = video(num_frames, num_frames / fps)
    segments = plan_segments(spread(max_frames, frames_per_segment=per_segment), info)
    frames = [frame for segment in segments for frame in segment.frames]
    assert (segments[0].start_s, segments[-1].end_s) == (0.0, info.duration_s)
    assert all(left.end_s == right.start_s for left, right in itertools.pairwise(segments))
    assert all(segment.num_frames == per_segment for segment in segments[:-1])
    assert frames == sorted(set(frames))
    assert len(frames) == max(1, min(round(info.duration_s), max_frames, num_frames))


def test_spread_frames_are_those_of_the_processor_that_samples_so():
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    settings = itertools.product(
        (1, 2, 24, 25, 66, 67, 68, 100, 1649, 1650, 1651, 1725, 2000, 9000, 107_892),
        (0.5, 1, 23.976, 25, 30000 / 1001, 60),
        (1, 7, 64),
        (0.5, 1, 2),
        (0, 1, 3),
    )
    for num_frames, fps, max_frames, frames_per_s, skip_s in settings:
        info = video(num_frames, num_frames / fps)
        seen = VideoMetadata(total_num_frames=num_frames, fps=info.fps, duration=info.duration_s)
        wanted = SmolVLMVideoProcessor.sample_frames(
            None, seen, num_frames=max_frames, fps=frames_per_s, skip_secs=skip_s
        )
        assert spread_indices(spread(max_frames, frames_per_s, skip_s), info) == wanted.tolist()
