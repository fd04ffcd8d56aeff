import pytest

from longvlm.schemas.timeline import Segment, VideoInfo, cut_into_units


def test_what_cannot_be_played_is_no_video():
    with pytest.raises(ValueError, match="not a playable video"):
        VideoInfo(0, 25.0, 10.0, 640, 360, "h264", "pyav")


def test_bounds_widen_to_the_frames_really_shown():
    segment = Segment(0, 4.0, 6.0, (100, 125))
    shown = segment.showing((75, 175), 3.0, 7.04)
    assert (shown.start_s, shown.end_s, shown.frames) == (3.0, 7.04, (75, 175))
    assert segment.showing((100, 125), 4.0, 5.04) == segment


@pytest.mark.parametrize("frames", [(), (5, 4)])
def test_a_segment_has_frames_in_order(frames):
    with pytest.raises(ValueError, match="not a segment"):
        Segment(0, 0.0, 1.0, frames)


def test_units_hold_whole_segments_and_at_most_a_hundred_frames():
    segments = [Segment(i, i, i + 1, (i,) * 30) for i in range(7)]
    units = cut_into_units(segments)
    assert [len(unit) for unit in units] == [3, 3, 1]
    assert [segment for unit in units for segment in unit] == segments
    assert len(cut_into_units([Segment(0, 0, 1, (0,) * 300)])) == 1
