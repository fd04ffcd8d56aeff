import json

import pytest
import torch
from PIL import Image
from transformers import SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.pipeline.vision.towers.smolvlm import FRAMES_PER_FORWARD
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import from_settings, tiny
from models import save_smolvlm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_smolvlm(tmp_path_factory.mktemp("smol"))


def frames(num_frames, side=64):
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randint(0, 256, (num_frames, side, side, 3), dtype=torch.uint8, generator=generator)


def test_tokens_are_the_connector_s_outputs(folder, agree, device):
    some = frames(2 * FRAMES_PER_FORWARD["cpu"] + 1)
    encoded = load_tower(str(folder), device=device).encode(some).patches
    oracle = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = Normalisation.from_folder(folder).apply(some, CPU, torch.float32)
    with torch.inference_mode():
        theirs = oracle.model.get_image_features(pixels[None], return_dict=True).pooler_output[0]
    agree(encoded.flatten(0, 1), theirs, atol=1e-4, rtol=1e-4)


def test_pixels_are_those_of_the_model_s_own_processor(folder):
    (picture,) = frames(1)
    theirs = SmolVLMImageProcessorPil.from_pretrained(folder)(Image.fromarray(picture.numpy()), return_tensors="pt")
    ours = Normalisation.from_folder(folder).apply(picture[None], CPU, torch.float32)
    torch.testing.assert_close(ours[0], theirs.pixel_values[0, 0], atol=1e-6, rtol=0)


def test_the_mean_of_projections_is_the_projection_of_the_mean(folder):
    tower = load_tower(str(folder), "float32")
    wide = torch.randn(5, 4 * 32)
    project = tower._connector.modality_projection
    torch.testing.assert_close(project(wide).mean(dim=0), project(wide.mean(dim=0)), atol=1e-5, rtol=0)


def test_it_takes_squares_of_one_size(folder):
    spec = describe_tower(str(folder))
    assert (spec.patch_grid, spec.frame_size, spec.aspect, spec.dim) == ((2, 2), (64, 64), "stretch", 32)
    assert tiny(spec).shown == "decoder"
    with pytest.raises(InputError, match="takes one grid of patches, 2 x 2; leave patch_grid out"):
        from_settings({"patch_grid": [3, 3]}, spec)
    with pytest.raises(ValueError, match="frames of 32 x 32 pixels, and the tower takes 64"):
        load_tower(str(folder)).encode(frames(2, 32))


def test_a_connector_that_does_not_fit_the_grid_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"scale_factor": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its connector takes squares of 3 x 3 patches; correct it"):
        describe_tower(str(tmp_path))
