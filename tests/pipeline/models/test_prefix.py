from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix, prefix_of
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.vision.tokens import VideoTokens

SEGMENTS = [{"start_s": 10.0 * i, "end_s": 10.0 * i + 9, "first_frame": 10 * i} for i in range(4)]
SPANS = torch.tensor([[4, 9], [0, 3], [20, 29], [25, 25], [31, 39], [30, 30]])
VIDEO = VideoTokens(
    torch.randn(6, 16), torch.ones(6, dtype=torch.int64), SPANS, (2, 2, 2), (10, 10, 10), torch.randn(2, 16)
)


def test_times_are_those_of_stored_segments_whatever_a_budget_left():
    selected = prefix_of(VIDEO, SEGMENTS, Sight("tower", -2, 2))
    assert selected.times == SegmentTimes(2, (2, 2, 2), (0.0, 20.0, 30.0), (9.0, 29.0, 39.0))
    joined = prefix_of(replace(VIDEO, counts=(2, 4), num_frames=(10, 20)), SEGMENTS, Sight("tower", -2, 0))
    assert joined.times == SegmentTimes(0, (2, 4), (0.0, 20.0), (9.0, 39.0))


def test_a_model_is_given_global_tokens_or_whole_frames():
    with_global, without = (prefix_of(VIDEO, SEGMENTS, Sight("tower", -2, number)) for number in (2, 0))
    assert torch.equal(with_global.rows, VIDEO.prefix())
    assert with_global.num_whole_frames is None
    assert torch.equal(without.rows, VIDEO.local)
    assert without.num_whole_frames == 30
    merged = replace(VIDEO, sizes=torch.tensor([1, 2, 1, 1, 1, 1]))
    assert prefix_of(merged, SEGMENTS, Sight("tower", -2, 0)).num_whole_frames is None


def test_times_have_to_be_those_of_the_rows():
    with pytest.raises(ValueError, match="segments need a row and a time each"):
        SegmentTimes(0, (1, 2), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="times of 3 rows were given for 4"):
        VideoPrefix(torch.zeros(4, 64), times=SegmentTimes(1, (2,), (0.0,), (1.0,)))
    assert "rows=[4, 64]" in repr(VideoPrefix(torch.zeros(4, 64)))
