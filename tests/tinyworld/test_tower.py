import json

import numpy as np
import pytest
import torch

from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.tinyworld.scenes import COLOURS, draw_scene
from longvlm.tinyworld.tower import (
    DIM,
    GRID,
    HOUSE,
    IMAGE_PX,
    OBJECT,
    read_labelled_frames,
    train_tower,
    write_untrained,
)
from longvlm.tinyworld.world import make_world

SEED = 31


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), SEED, 3).parent


@pytest.fixture(scope="module")
def frames(videos):
    return read_labelled_frames(videos, SEED, 3)


def test_frames_are_those_that_an_index_looks_at(frames):
    assert len(frames.pixels) == sum(4 * draw_scene(SEED, number).num_segments for number in range(3))
    assert frames.pixels.shape[1:] == (IMAGE_PX, IMAGE_PX, 3)
    assert len(frames.texts) == len(frames.kinds) == len(frames.pixels)


def test_every_frame_shows_its_object_and_the_house(frames):
    assert ((frames.kinds == OBJECT).sum(axis=1) > 0).all()
    assert ((frames.kinds == HOUSE).sum(axis=1) > 0).mean() > 0.9
    first = draw_scene(SEED, 0).events[0]
    assert COLOURS[frames.thing[0, 0]] == first.colour
    assert frames.texts[0].startswith(("a ", "an "))
    assert first.name in frames.texts[0]
    assert np.abs(frames.places).max() < 3


def test_the_tower_is_a_whole_clip_and_learns(tmp_path, videos, capsys):
    write_untrained(tmp_path / "tower", seed=0)
    spec = describe_tower(str(tmp_path / "tower"))
    assert (spec.dim, spec.patch_grid, spec.image_size, spec.has_cls) == (DIM, (GRID, GRID), IMAGE_PX, True)
    train_tower(tmp_path / "tower", videos, num_videos=3, steps=8, seed=SEED, batch_frames=16)
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert last["kind"] < first["kind"]
    assert last["place"] < first["place"]
    assert describe_tower(str(tmp_path / "tower")).weights != spec.weights
    assert load_text_encoder(str(tmp_path / "tower")).encode(["a red circle on a meadow"]).shape == (1, spec.search_dim)
    encoded = load_tower(str(tmp_path / "tower")).encode(torch.zeros(2, IMAGE_PX, IMAGE_PX, 3, dtype=torch.uint8))
    assert encoded.patches.shape == (2, GRID * GRID, DIM)
