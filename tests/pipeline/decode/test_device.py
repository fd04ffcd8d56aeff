"""What is around a GPU's decoder; a card's part is played by the CPU, which hands out NV12 as a card does."""

import av
import numpy as np
import pytest

from clips import damage, write_clip, write_oriented
from longvlm.pipeline.decode import container, video
from longvlm.pipeline.decode.device import DeviceDecoder
from longvlm.pipeline.decode.frames import FrameReader
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.scaling import Scaler
from longvlm.pipeline.decode.video import close_video, decode
from support import VIDEOS, cases

SIZE, WANTED = (56, 72), [0, 3, 17, 24, 59, 60, 99]
SEMI_PLANAR = {"yuv420p": "nv12", "yuvj420p": "nv12", "yuv420p10le": "p010le"}


def as_from_a_card(frame):
    return frame.reformat(format=SEMI_PLANAR[frame.format.name])


@pytest.fixture
def card(monkeypatch):
    """A card that hands out what it is told to make of each frame, NV12 or P010 as cards do."""
    device = DeviceDecoder.__new__(DeviceDecoder)
    device.missing = None
    made = {"of": as_from_a_card, "frames": 0}
    plain = FrameReader._decode

    def decoded(self, packets):
        for number, frame in plain(self, packets):
            made["frames"] += self.file.on_device
            yield number, made["of"](frame) if self.file.on_device else frame

    monkeypatch.setattr(container, "hwaccel", lambda: None)
    monkeypatch.setattr(FrameReader, "_decode", decoded)
    monkeypatch.setattr(video, "_DEVICES", [device])
    yield made
    close_video()


@pytest.fixture(scope="module")
def on_cpu():
    """Gives a function that decodes as `decode` does, in a child that knows no card."""
    with Decoder(60, 1500 << 20) as decoder:
        yield decoder.decode


@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("resize", ["decoder", "nearest", "letterbox"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"codec": "libx265"},
        {"pix_fmt": "yuvj420p"},
        {"codec": "libx265", "pix_fmt": "yuv420p10le"},
        {"options": {"preset": "medium", "bf": "3"}, "gop": 30},
    ],
    ids=["h264", "hevc", "full-range", "10-bit", "b-frames"],
)
def test_what_a_card_hands_out_becomes_the_pixels_of_the_cpu(tmp_path, card, on_cpu, settings, resize, mode):
    path = str(write_clip(tmp_path / "a.mp4", 100, size=(98, 66), noise=30, **settings))
    wanted = on_cpu(path, WANTED, SIZE, mode, resize)
    found = decode(path, WANTED, SIZE, mode, resize)
    assert card["frames"] > 0
    assert (found.shown, found.decoder, found.cpu_because) == (wanted.shown, wanted.decoder, None)
    np.testing.assert_array_equal(found.frames, wanted.frames)


def test_pictures_that_are_turned_stay_so(tmp_path, card, on_cpu):
    path = str(write_oriented(tmp_path / "a.mp4", (0, 1, -1, 0)))
    found = decode(path, [0, 5, 11], SIZE)
    assert (card["frames"] > 0, found.cpu_because) == (True, None)
    np.testing.assert_array_equal(found.frames, on_cpu(path, [0, 5, 11], SIZE).frames)


@pytest.mark.parametrize(
    ("name", "settings", "because"),
    [
        ("a.mp4", {"codec": "libsvtav1"}, "codec av1"),
        ("a.mp4", {"codec": "mpeg4"}, "codec mpeg4"),
        ("a.mp4", {"pix_fmt": "yuv444p"}, "pixels yuv444p"),
    ],
)
def test_what_cards_do_not_decode_the_cpu_does(tmp_path, card, on_cpu, name, settings, because):
    path = str(write_clip(tmp_path / name, 60, **settings))
    found = decode(path, [0, 30], SIZE)
    assert (card["frames"], found.cpu_because) == (0, because)
    np.testing.assert_array_equal(found.frames, on_cpu(path, [0, 30], SIZE).frames)


def test_a_card_that_makes_something_else_of_the_first_frame_is_not_believed(tmp_path, card, on_cpu):
    def brighter(frame):
        pixels = frame.to_ndarray()
        pixels[0, 0] += 1
        other = av.VideoFrame.from_ndarray(pixels, format="yuv420p")
        other.pts, other.time_base = frame.pts, frame.time_base
        return other

    card["of"] = brighter
    path = str(write_clip(tmp_path / "a.mp4", 60))
    found = decode(path, [0, 30], SIZE)
    assert (card["frames"] > 0, found.cpu_because) == (True, "other pixels")
    np.testing.assert_array_equal(found.frames, on_cpu(path, [0, 30], SIZE).frames)


@pytest.mark.parametrize(("mode", "damaged", "near"), [("exact", 122, [100, 122, 124]), ("keyframe", 120, [100, 119])])
def test_where_a_picture_is_missing_the_cpu_has_the_last_word(tmp_path, card, on_cpu, mode, damaged, near):
    path = write_clip(tmp_path / "a.mp4", 300, gop=30)
    damage(path, damaged, damaged, b"\0")
    for wanted in ([0, 10], near, [200, 299]):
        found, right = decode(str(path), wanted, SIZE, mode), on_cpu(str(path), wanted, SIZE, mode)
        np.testing.assert_array_equal(found.frames, right.frames)
        assert (found.shown, found.decoder) == (right.shown, right.decoder)
    assert card["frames"] > 0
    assert found.cpu_because == "decode_failed"


def test_without_a_device_the_cpu_decodes_and_says_why(tmp_path, on_cpu):
    """In a child that is confined as one with a card is."""
    path = str(write_clip(tmp_path / "a.mp4", 60))
    with Decoder(60, 1500 << 20, "cuda") as decoder:
        found = decoder.decode(path, [0, 30], SIZE)
        assert "seccomp" in decoder.confined
    assert found.cpu_because is None or found.cpu_because.startswith("no device: ")
    np.testing.assert_array_equal(found.frames, on_cpu(path, [0, 30], SIZE).frames)


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS, "good/*"))
def test_semi_planar_frames_of_real_files_are_scaled_bit_for_bit(path):
    with av.open(str(path), metadata_errors="replace") as clip:
        frame = next(clip.decode(video=0))
    if frame.format.name not in SEMI_PLANAR:
        pytest.skip(f"a card has no {frame.format.name}")
    for scaler in (Scaler(), Scaler(is_colour_between=True)):
        np.testing.assert_array_equal(scaler.scale(as_from_a_card(frame), SIZE), scaler.scale(frame, SIZE))
        np.testing.assert_array_equal(scaler.rgb(as_from_a_card(frame)), scaler.rgb(frame))
