"""Pixels are those of decord 0.6 where it used to decode, bit for bit, and those of decoding every frame."""

import av
import numpy as np
import pytest

from clips import damage, is_upright, read_number, remux, write_clip, write_oriented
from longvlm.pipeline.decode.scaling import Orientation, Scaler
from longvlm.pipeline.decode.video import OpenVideo, close_video, decode, probe
from support import VIDEOS, lent

B_FRAMES = {"preset": "medium", "bf": "3"}
CLIPS = {
    "h264.mp4": {},
    "b-frames.mp4": {"options": B_FRAMES},
    "b-frames.mkv": {"options": B_FRAMES, "fps": 30, "audio_s": 8.7},
    "vfr.mkv": {"times_s": [number * number / 500 for number in range(60)]},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "10-bit.mp4": {"pix_fmt": "yuv420p10le"},
    "full-range.mp4": {"pix_fmt": "yuvj420p"},
    "colour-of-half-width.mp4": {"pix_fmt": "yuv422p"},
    "colour-everywhere.mp4": {"pix_fmt": "yuv444p"},
    "odd.mov": {"size": (98, 66)},
}
WANTED, SIZE = [0, 1, 7, 24, 25, 40, 59], (48, 56)


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    close_video()


def by_decord(path, wanted, size):
    decord = pytest.importorskip("decord")
    return decord.VideoReader(str(path), decord.cpu(0), size[1], size[0], num_threads=1).get_batch(wanted).asnumpy()


@pytest.mark.parametrize("name", CLIPS)
def test_pixels_are_decords_bit_for_bit(tmp_path, name):
    path = write_clip(tmp_path / name, 60, noise=30, **CLIPS[name])
    np.testing.assert_array_equal(decode(str(path), WANTED, SIZE).frames, by_decord(path, WANTED, SIZE))


@pytest.mark.corpus
@pytest.mark.parametrize(
    "name", ["sam2__01_dog.mp4", "DVR-Scan__traffic_camera_vfr.mp4", "torchcodec__h264_10bits.mp4"]
)
def test_pixels_of_real_clips_are_decords(name):
    path, wanted = lent(VIDEOS / "good" / name), [0, 3, 8]
    np.testing.assert_array_equal(decode(str(path), wanted, SIZE).frames, by_decord(path, wanted, SIZE))


def test_what_decord_could_not_open_keeps_the_pixels_that_it_had(tmp_path):
    """A Matroska as it is streamed tells no duration: its colour is where the frames say that it is."""
    path = remux(write_clip(tmp_path / "a.mp4", 60, noise=30), tmp_path / "a.mkv", live="1")
    frames = decode(str(path), WANTED, SIZE).frames
    np.testing.assert_array_equal(frames, plainly(path, Scaler()))
    assert (frames != plainly(path, Scaler(is_colour_between=True))).any()


def plainly(path, scaler):
    """The wanted frames of a decoder that decodes all of them, from first to last."""
    with av.open(str(path)) as container:
        frames = [*container.decode(video=0)]
    return np.stack([scaler.scale(frames[number], SIZE) for number in WANTED])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", {"options": B_FRAMES | {"x264-params": "b-pyramid=none"}}),
        ("h264-pyramid.mkv", {"options": B_FRAMES}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:bframes=4:b-pyramid=1"}}),
        ("av1.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}}),
    ],
)
def test_passing_over_frames_that_no_other_refers_to_changes_no_pixel(tmp_path, name, options):
    path = write_clip(tmp_path / name, 60, noise=30, gop=30, **options)
    scaler = Scaler(is_colour_between=name.startswith("h264"))
    np.testing.assert_array_equal(decode(str(path), WANTED, SIZE).frames, plainly(path, scaler))


def test_frames_are_passed_over(tmp_path):
    """Of frames that nobody wants and no other refers to a decoder gives none, which is what makes it quick."""
    path = write_clip(tmp_path / "a.mp4", 60, options=B_FRAMES, gop=60)
    video = OpenVideo(str(path), "exact")
    given = [number for number, _ in frames_on_the_way_to(video, 59)]
    assert len(given) < 40
    assert given[-1] == 59
    video.reader.close()


def frames_on_the_way_to(video, number):
    reader = video.reader
    decoding = reader._decode
    passed = []

    def watched(packets):
        for found in decoding(packets):
            passed.append(found)
            yield found

    reader._decode = watched
    reader._seek(0)
    list(reader.read_exact([number]))
    return passed


def test_a_frame_of_another_size_gets_a_graph_of_its_own(tmp_path):
    scaler = Scaler(is_colour_between=True)
    for size in ((96, 64), (64, 96), (96, 64)):
        path = write_clip(tmp_path / f"{size[0]}.mp4", 2, size=size)
        with av.open(str(path)) as container:
            frames = [*container.decode(video=0)]
        assert scaler.scale(frames[0], SIZE).shape == (*SIZE, 3)


def test_a_damaged_packet_costs_no_more_than_its_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, gop=10, noise=30, options=B_FRAMES)
    damage(path, 33, 34)
    assert probe(str(path)).num_frames == 60
    assert decode(str(path), [0, 29, 45, 59], SIZE).shown == (0, 29, 45, 59)


# --- orientation ---

MATRICES = {
    "as-it-is": (1, 0, 0, 1),
    "mirrored-left-right": (-1, 0, 0, 1),
    "mirrored-top-bottom": (1, 0, 0, -1),
    "turned-by-180": (-1, 0, 0, -1),
    "turned-right": (0, 1, -1, 0),
    "turned-left": (0, -1, 1, 0),
    "transposed": (0, 1, 1, 0),
    "transposed-and-turned": (0, -1, -1, 0),
    "of-zeros": (0, 0, 0, 0),
    "onto-a-line": (1, 0, 0, 0),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("resize", ["decoder", "nearest"])
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
def test_frames_are_shown_as_a_player_shows_them(tmp_path, name, resize, mode):
    matrix = MATRICES[name]
    path = str(write_oriented(tmp_path / "a.mp4", matrix))
    info = probe(path, mode)
    assert (info.width, info.height) == (96, 64)
    decoded = decode(path, [0, 5, 11], (64, 64), mode, resize)
    assert all(is_upright(frame) for frame in decoded.frames)
    assert [read_number(frame) for frame in decoded.frames] == list(decoded.shown)


def test_steps_are_taken_in_order():
    stored = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)  # a b, c d
    a, b, c, d = (stored[place].tolist() for place in ((0, 0), (0, 1), (1, 0), (1, 1)))
    assert Orientation(transpose=True).apply(stored).tolist() == [[a, c], [b, d]]
    assert Orientation(transpose=True, mirror_rows=True).apply(stored).tolist() == [[c, a], [d, b]]  # turned right
    assert Orientation(mirror_columns=True).apply(stored).tolist() == [[c, d], [a, b]]
