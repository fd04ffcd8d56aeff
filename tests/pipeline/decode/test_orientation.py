import numpy as np
import pytest

from clips import is_upright, read_number, write_oriented
from longvlm.pipeline.decode import video as decoding
from longvlm.pipeline.decode.orientation import Orientation
from longvlm.pipeline.decode.video import decode, probe

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


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    decoding.close_video()


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
