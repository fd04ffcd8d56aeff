import torch

from benchmarks.untrained_tower import DIM, build_untrained_tower
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower


def test_the_untrained_tower_is_a_whole_clip(tmp_path):
    build_untrained_tower(tmp_path, image_size=28)
    spec = describe_tower(str(tmp_path))
    assert (spec.dim, spec.patch_grid, spec.image_size, spec.search_dim) == (DIM, (2, 2), 28, DIM // 2)
    encoded = load_tower(str(tmp_path)).encode(torch.zeros(3, 28, 28, 3, dtype=torch.uint8))
    assert encoded.patches.shape == (3, 4, DIM)
    texts = load_text_encoder(str(tmp_path)).encode(["a red square", "a blue circle"])
    assert texts.shape == (2, DIM // 2)
    assert not torch.allclose(texts[0], texts[1])


def test_the_same_seed_makes_the_same_tower(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_untrained_tower(tmp_path / name, seed=seed)
    a, b, c = (describe_tower(str(tmp_path / name)).weights for name in "abc")
    assert a == b != c
