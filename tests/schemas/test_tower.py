from dataclasses import replace

import pytest

from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import from_settings, long
from longvlm.schemas.tower import MAX_GRID_SIDE, TowerSpec

SQUARE = TowerSpec("square", "w0", 24, (16, 16), 1024, 224, has_cls=True, search_dim=768)
ANY = TowerSpec(
    "any",
    "w1",
    0,
    (10, 16),
    8192,
    (320, 512),
    has_cls=False,
    search_dim=None,
    frames_per_picture=2,
    num_streams=4,
    aspect="letterbox",
    has_positions=True,
)


def test_what_a_tower_is_shown():
    assert (SQUARE.num_patches, SQUARE.frame_size, SQUARE.metric_dim) == (256, (224, 224), 1024)
    assert (ANY.num_patches, ANY.frame_size, ANY.metric_dim) == (160, (320, 512), 2048)
    assert [ANY.num_pictures(frames) for frames in (1, 2, 3, 10)] == [1, 1, 2, 5]
    assert [SQUARE.num_pictures(frames) for frames in (1, 10)] == [1, 10]


def test_a_grid_keeps_the_pixels_of_a_token():
    wider = ANY.shown((9, 20), None)
    assert (wider.patch_grid, wider.image_size, wider.aspect) == ((9, 20), (288, 640), "letterbox")
    assert ANY.shown((10, 16), "letterbox") == ANY == ANY.shown(None, None)
    assert SQUARE.shown((16, 16), None) == SQUARE


def test_a_recipe_file_says_how_a_tower_is_shown_frames():
    recipe = from_settings({"patch_grid": [9, 20], "aspect": "stretch"}, ANY)
    assert (recipe.tower.frame_size, recipe.shown, recipe.patches_per_segment) == ((288, 640), "decoder", 900)
    assert from_settings({"aspect": "letterbox"}, SQUARE).shown == "letterbox"
    assert recipe.fingerprint != from_settings({}, ANY).fingerprint
    assert from_settings({"name": "long"}, ANY) == long(ANY)


@pytest.mark.parametrize(
    ("tower", "settings", "says"),
    [
        (ANY, {"patch_grid": [10]}, "write rows and columns"),
        (ANY, {"patch_grid": "10x16"}, "write rows and columns"),
        (ANY, {"patch_grid": [0, 16]}, "write rows and columns"),
        (ANY, {"patch_grid": [2.5, 16]}, "write rows and columns"),
        (ANY, {"patch_grid": [True, 16]}, "write rows and columns"),
        (ANY, {"patch_grid": [MAX_GRID_SIDE + 1, 16]}, "at most 128 each"),
        (SQUARE, {"patch_grid": [8, 16]}, "takes one grid of patches, 16 x 16; leave patch_grid out"),
        (ANY, {"aspect": "crop"}, "use one of stretch, letterbox"),
        (ANY, {"resize": "nearest"}, "leave resize out"),
        (replace(ANY, aspect="stretch"), {"resize": "nearest"}, "leave resize out"),
        (SQUARE, {"resize": "nearest", "aspect": "letterbox"}, "leave resize out"),
    ],
)
def test_what_a_tower_cannot_be_shown_is_a_sentence(tower, settings, says):
    with pytest.raises(InputError, match=says):
        from_settings(settings, tower)


def test_a_square_may_be_resized_as_the_reference_does():
    assert from_settings({"resize": "nearest"}, SQUARE).shown == "nearest"
