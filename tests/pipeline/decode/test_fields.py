import pytest

from clips import field_pictures, write_clip, write_fields
from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.fields import field_pairs
from longvlm.pipeline.decode.video import close_video, decode, probe

FIELDS = [False, True, True, True] * 3 + [False]  # 13 frames in 22 packets


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    close_video()


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4", "a.h264", "a.avi"])
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
def test_two_fields_are_one_frame(tmp_path, name, mode):
    path = str(write_fields(tmp_path / name, 13, FIELDS.__getitem__))
    info = probe(path, mode)
    assert info.num_frames == 13
    assert info.duration_s == pytest.approx(0.52, abs=0.003)
    assert info.fps == pytest.approx(25, rel=0.01)
    assert info.times_ns.tolist() == pytest.approx([40_000_000 * number for number in range(13)], abs=1_000_000)
    decoded = decode(path, [0, 1, 2, 7, 12], (32, 32), mode)
    greys = [round(float(frame.mean() - 2) / 9.3) for frame in decoded.frames]  # studio levels, 8 apart
    assert greys == list(decoded.shown) == [0, 1, 2, 7, 12]


def test_whole_frames_are_not_read(tmp_path):
    assert VideoFile(str(write_clip(tmp_path / "a.mp4", 5))).fields is None
    assert VideoFile(str(write_clip(tmp_path / "b.ts", 5, codec="mpeg2video"))).fields is None


def test_a_field_without_its_other_half_is_a_frame():
    (head, *_), *_ = pictures = field_pictures(3)
    pairs = field_pairs(head)
    assert pairs is not None
    (first, second), (third, _), (fifth, sixth) = pictures
    found = [pairs.is_second(packet) for packet in (first, second, third, fifth, sixth)]
    assert found == [False, True, False, False, True]


@pytest.mark.parametrize("extradata", [None, b"", b"\1", b"\0\0\1\x67", b"\0\0\1\x67\x42\0\x1e", b"\1" * 40, b"\0\0\1"])
def test_parameters_that_say_nothing_tell_of_no_fields(extradata):
    assert field_pairs(extradata) is None
