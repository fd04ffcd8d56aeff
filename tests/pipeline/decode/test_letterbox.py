"""Frames of a size that is no square, and where a picture lies that keeps its shape within one."""

from fractions import Fraction

import av
import numpy as np
import pytest

from clips import is_upright, read_number, write_clip
from longvlm.pipeline.decode import video as decoding
from longvlm.pipeline.decode.scaling import letterboxed
from longvlm.pipeline.decode.video import decode, probe

FRAMED = [15, 31]  # frames of `write_clip` with a white last row: no edge of theirs is black
# width and height of a video, height and width to fill, and what is filled: top, left, height, width
BOXES = {
    "wide": ((128, 64), (64, 64), (16, 0, 32, 64)),
    "tall": ((64, 128), (64, 64), (0, 16, 64, 32)),
    "exact": ((96, 64), (64, 96), (0, 0, 64, 96)),
    "wide-enlarged": ((256, 144), (320, 512), (16, 0, 288, 512)),
    "columns-left-over": ((128, 96), (320, 512), (0, 42, 320, 427)),  # 43 on the right
    "rows-left-over": ((96, 64), (45, 60), (2, 0, 40, 60)),  # 3 below
    "tall-in-wide": ((90, 160), (320, 512), (0, 166, 320, 180)),
}


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    decoding.close_video()


def box_of(frame):
    """Where the picture of a framed frame lies, all around it being black."""
    bright = frame.max(axis=2) > 100
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    around = frame.copy()
    around[top : top + height, left : left + width] = 0
    assert not around.any()
    return int(top), int(left), int(height), int(width)


def within(frame, box):
    top, left, height, width = box
    return frame[top : top + height, left : left + width]


@pytest.mark.parametrize("name", BOXES)
def test_a_picture_keeps_its_shape_in_the_middle_of_black(tmp_path, name):
    shown, size, box = BOXES[name]
    path = str(write_clip(tmp_path / "a.mp4", 40, size=shown))
    decoded = decode(path, FRAMED, size, resize="letterbox")
    assert (decoded.decoder, decoded.frames.shape) == ("pyav", (2, *size, 3))
    assert [box_of(frame) for frame in decoded.frames] == [box, box]
    assert [read_number(within(frame, box)) for frame in decoded.frames] == FRAMED
    stretched = decode(path, FRAMED, size)
    assert [box_of(frame) for frame in stretched.frames] == [(0, 0, *size)] * 2
    assert [read_number(frame) for frame in stretched.frames] == FRAMED


@pytest.mark.parametrize(("shape", "box"), [((512, 8), (15, 0, 1, 32)), ((8, 512), (0, 15, 32, 1))])
def test_the_thinnest_picture_is_a_pixel_thin(tmp_path, shape, box):
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *shape, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((*shape[::-1], 3), 255, np.uint8))))
        container.mux(stream.encode(None))
    assert [box_of(frame) for frame in decode(path, [0, 2], (32, 32), resize="letterbox").frames] == [box, box]


@pytest.mark.parametrize("name", ["wide", "columns-left-over"])
def test_keyframes_lie_where_other_frames_do(tmp_path, name):
    shown, size, box = BOXES[name]
    path = str(write_clip(tmp_path / "a.mp4", 60, size=shown, gop=15))
    decoded = decode(path, [1, 16, 58], size, "keyframe", "letterbox")
    assert (decoded.decoder, decoded.shown) == ("pyav-keyframes", (0, 15, 45))
    assert box_of(decoded.frames[1]) == box
    assert [read_number(within(frame, box)) for frame in decoded.frames] == [0, 15, 45]
    assert decode(path, [1], size, "exact", "letterbox").frames.shape == (1, *size, 3)  # and the other way again


@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("rotation", [90, -90])
def test_what_is_turned_is_fitted_as_it_is_shown(tmp_path, rotation, mode):
    path = str(write_clip(tmp_path / "a.mp4", 40, size=(128, 64), rotation=rotation, gop=15))
    for resize, box in (("letterbox", (0, 10, 30, 60)), ("decoder", (0, 0, 30, 80))):
        decoded = decode(path, [15, 30], (30, 80), mode, resize)
        assert box_of(decoded.frames[0]) == box
        assert all(is_upright(within(frame, box)) for frame in decoded.frames)
        assert [read_number(within(frame, box)) for frame in decoded.frames] == [15, 30]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_that_are_no_squares_are_shown_as_wide_as_they_are(tmp_path, name):
    path = str(write_clip(tmp_path / name, 40, size=(64, 96), pixel_aspect=Fraction(3), gop=15))
    assert (probe(path).width, probe(path).height) == (64, 96)  # as stored
    for mode in ("exact", "keyframe"):
        assert box_of(decode(path, [15], (64, 64), mode, "letterbox").frames[0]) == (16, 0, 32, 64)
    assert box_of(decode(path, [15], (64, 64)).frames[0]) == (0, 0, 64, 64)


def test_pixels_that_are_no_squares_are_turned_with_the_picture(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 40, size=(96, 64), rotation=90, pixel_aspect=Fraction(3)))
    assert box_of(decode(path, [15], (64, 64), resize="letterbox").frames[0]) == (0, 16, 64, 32)


def test_a_video_whose_size_changes_is_fitted_frame_by_frame(tmp_path):
    parts = [write_clip(tmp_path / f"{width}.ts", 20, size=(width, 64)) for width in (128, 32)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = decode(str(path), [15, 35], (64, 64), resize="letterbox").frames
    assert [box_of(frame) for frame in frames] == [(16, 0, 32, 64), (0, 16, 64, 32)]
    assert [read_number(within(frame, box_of(frame))) for frame in frames] == [15, 15]


def test_what_fits_is_left_as_it_is():
    frames = np.ones((2, 4, 6, 3), dtype=np.uint8)
    assert letterboxed(frames, (4, 6)) is frames
    assert letterboxed(frames, (7, 6)).any(axis=(0, 2, 3)).tolist() == [False] + [True] * 4 + [False] * 2
