import pytest

from clips import damage, read_number, write_clip
from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.frames import FrameReader, KeyframeMissingError
from longvlm.schemas.errors import ErrorCode, TerminalError


def reader_of(path):
    file = VideoFile(str(path))
    return FrameReader(file, file.frame_index_from_packets())


def shown(pairs):
    found = [(number, read_number(frame.to_ndarray(format="rgb24"))) for number, frame in pairs]
    assert all(number == pictured for number, pictured in found)
    return [number for number, _ in found]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_reading_on_in_small_steps_gives_every_frame(tmp_path, name):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    options = {"bf": "2"} if codec == "mpeg4" else {"preset": "medium", "bf": "3"}
    reader = reader_of(write_clip(tmp_path / name, 60, codec=codec, options=options))
    for start in range(0, 60, 3):
        assert shown(reader.read_exact([start, start + 1, start + 2])) == [start, start + 1, start + 2]


def test_frames_far_apart_are_reached_by_seeking(tmp_path):
    reader = reader_of(write_clip(tmp_path / "a.mp4", 500, gop=10))
    decoded = 0
    decode = reader._decode

    def counting(packets):
        nonlocal decoded
        for pair in decode(packets):
            decoded += 1
            yield pair

    reader._decode = counting
    assert shown(reader.read_exact([5, 255, 495])) == [5, 255, 495]
    assert decoded < 40


def test_a_few_missing_frames_are_stood_in_for(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100, gop=1, codec="mpeg4")
    damage(path, 50, 51)
    reader = reader_of(path)
    found = [number for number, _ in reader.read_exact([49, 50, 51, 52, 99])]
    assert found[0] == 49
    assert found[-2:] == [52, 99]
    assert all(49 <= number <= 51 for number in found[1:3])


def test_a_gap_is_a_failure_that_says_where(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100)
    damage(path, 40, 99)
    reader = reader_of(path)
    assert shown(reader.read_exact([10, 30])) == [10, 30]
    with pytest.raises(TerminalError, match=r"around \d\.\d s of 4\.0 s") as caught:
        list(reader.read_exact([80]))
    assert caught.value.code == ErrorCode.DECODE_FAILED


def test_a_video_of_noise_has_no_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 30)
    damage(path, 0, 29)
    with pytest.raises(TerminalError, match="Not one frame") as caught:
        reader_of(path)
    assert caught.value.code == ErrorCode.DECODE_FAILED


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_keyframes_one_by_one(tmp_path, name):
    reader = reader_of(write_clip(tmp_path / name, 100, gop=10))
    assert reader.frame_index.keyframes.tolist() == list(range(0, 100, 10))
    assert shown(reader.read_keyframes([0, 1, 2, 7])) == [0, 10, 20, 70]
    assert shown(reader.read_keyframes([8, 9])) == [80, 90]
    assert shown(reader.read_keyframes([3])) == [30]


def test_a_broken_keyframe_is_reported(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, gop=10)
    damage(path, 30, 30, b"\0")
    file = VideoFile(str(path))
    reader = FrameReader(file, file.frame_index_from_samples())
    assert shown(reader.read_keyframes([2, 4])) == [20, 40]
    with pytest.raises(KeyframeMissingError):
        list(reader.read_keyframes([2, 3]))
