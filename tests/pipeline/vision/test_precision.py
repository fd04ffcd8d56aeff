"""What a narrow tower sees and what is merged of it, on any device, beside a wide one's on the CPU."""

import pytest
import torch

from longvlm.pipeline.vision.merge import merge
from longvlm.pipeline.vision.towers.families import load_tower
from longvlm.schemas.recipe import halving_schedule
from models import save_clip_tower, save_siglip_tower

KEPT = 12


@pytest.fixture(scope="module", params=[save_clip_tower, save_siglip_tower], ids=["clip", "siglip"])
def folder(request, tmp_path_factory):
    return str(request.param(tmp_path_factory.mktemp("tower"), hidden=256))  # narrower ones' tokens are often alike


@pytest.fixture
def frames():
    return torch.randint(0, 256, (4, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def merged(patches):
    tokens = patches.flatten(0, 1)[None]
    return merge(tokens, halving_schedule(tokens.shape[1], KEPT))


def test_merged_tokens_of_bfloat16_are_finite_and_those_that_the_cpu_merges(folder, frames, device, agree):
    patches = load_tower(folder, "bfloat16", device).encode(frames).patches
    there, here = merged(patches), merged(patches.cpu())
    assert there.tokens.dtype == torch.float32
    assert there.tokens.isfinite().all()
    assert torch.equal(there.sizes.cpu(), here.sizes)
    assert torch.equal(there.spans.cpu(), here.spans)
    agree(there.tokens, here.tokens, atol=1e-5)


def test_merged_tokens_of_bfloat16_point_where_those_of_float32_do(folder, frames, device):
    wide = load_tower(folder).encode(frames).patches
    narrow = load_tower(folder, "bfloat16", device).encode(frames).patches.cpu()
    assert torch.cosine_similarity(narrow, wide, dim=-1).min() > 0.995
    wide, narrow = merged(wide).tokens[0], merged(narrow).tokens[0]
    near = torch.cosine_similarity(narrow[:, None], wide[None], dim=-1).max(dim=1).values
    assert near.mean() > 0.9  # how many tokens rounding sends elsewhere, into another mean, is each device's own
