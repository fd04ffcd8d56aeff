import pytest

from clips import write_clip
from longvlm.pipeline.decode.container import VideoFile, max_missing_frames
from longvlm.schemas.errors import ErrorCode, TerminalError


def timeline_of(path, *, indexed=False):
    file = VideoFile(str(path))
    return file.frame_index_from_samples() if indexed else file.frame_index_from_packets()


def failure_of(path, *, indexed=False):
    with pytest.raises(TerminalError) as caught:
        timeline_of(path, indexed=indexed)
    return caught.value.code


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", ErrorCode.EMPTY_FILE),
        (b"these are words, not pictures\n" * 100, ErrorCode.NOT_A_VIDEO),
        (b"#EXTM3U\n#EXTINF:10,\n/etc/hostname\n#EXT-X-ENDLIST\n", ErrorCode.NOT_A_VIDEO),
        (b"ffconcat version 1.0\nfile other.mp4\n", ErrorCode.NOT_A_VIDEO),
        (b"\x1aE\xdf\xa3" + b"\0" * 500, ErrorCode.DECODE_FAILED),
    ],
)
def test_what_is_no_video_says_so(tmp_path, content, code):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert failure_of(path) == code


def test_audio_alone_is_no_video(tmp_path):
    assert failure_of(write_clip(tmp_path / "a.m4a", 0, audio_s=1)) == ErrorCode.NO_VIDEO_STREAM


@pytest.mark.parametrize("indexed", [False, True])
def test_half_a_file_is_truncated(tmp_path, indexed):
    whole = write_clip(tmp_path / "a.mp4", 200, noise=60, options={"movflags": "faststart"}).read_bytes()
    index_first = whole.find(b"moov") < whole.find(b"mdat")
    half = tmp_path / "half.mp4"
    half.write_bytes(whole[: len(whole) // 2])
    assert failure_of(half, indexed=indexed and index_first) == ErrorCode.TRUNCATED


def test_index_and_packets_tell_the_same(tmp_path):
    file = VideoFile(str(write_clip(tmp_path / "a.mp4", 100, options={"preset": "medium", "bf": "2"})))
    index, packets = file.frame_index_from_samples(), file.frame_index_from_packets()
    assert index is not None
    assert index.num_frames == packets.num_frames == 100
    assert index.duration_s == pytest.approx(packets.duration_s) == pytest.approx(4.0)
    assert index.keyframes.tolist() == packets.keyframes.tolist()
    assert index.seek_pts.tolist() == packets.seek_pts.tolist()
    assert packets.has_closed_gops


def test_other_containers_have_no_complete_index(tmp_path):
    assert VideoFile(str(write_clip(tmp_path / "a.mkv", 20))).frame_index_from_samples() is None


def test_the_last_frame_may_stay_for_long(tmp_path):
    times_s = [0.0, 1.0, 2.0, 8.0]
    frame_index = VideoFile(str(write_clip(tmp_path / "a.mp4", 4, times_s=times_s))).frame_index_from_packets()
    assert frame_index.num_frames == 4
    assert 8.0 <= frame_index.duration_s <= 14.0


@pytest.mark.parametrize(("name", "duration_s"), [("a.mp4", 20_002), ("a.mkv", 20_002), ("a.ts", 4)])
def test_a_jump_of_the_clock_is_no_duration_and_some_clocks_cannot_jump(tmp_path, name, duration_s):
    times_s = [*(number / 25 for number in range(50)), *(20_000 + number / 25 for number in range(50))]
    frame_index = timeline_of(write_clip(tmp_path / name, 100, times_s=times_s))
    assert frame_index.num_frames == 100
    assert frame_index.duration_s == pytest.approx(duration_s, rel=0.02)


def test_open_gops_are_seen(tmp_path):
    options = {"preset": "medium", "x264-params": "open-gop=1:keyint=12:bframes=3"}
    frame_index = VideoFile(str(write_clip(tmp_path / "a.mp4", 100, options=options))).frame_index_from_packets()
    assert not frame_index.has_closed_gops


def test_slack_grows_with_the_video_up_to_a_second():
    assert [max_missing_frames(num_frames, 25.0) for num_frames in (1, 200, 1000, 100_000)] == [3, 3, 10, 25]


def test_a_cover_picture_is_not_the_video(tmp_path):
    import av
    import numpy as np

    path = tmp_path / "a.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("mp3", rate=16_000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        for start in range(0, 16_000, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert failure_of(path) == ErrorCode.NO_VIDEO_STREAM
