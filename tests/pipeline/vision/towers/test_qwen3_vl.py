import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.pipeline.vision.towers.qwen3_vl import DEFAULT_GRID, PICTURES_PER_FORWARD, patchify
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import from_settings, long
from models import save_qwen3_vl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_qwen3_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def oracle(folder):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def frames(num_frames, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32), (160, 32), (96, 256)])
def test_streams_are_the_merger_s_and_the_deepstack_mergers_outputs(folder, oracle, height, width, agree, device):
    some = frames(6, height, width)
    encoded = load_tower(str(folder), device=device).encode(some).patches
    pixels = Normalisation.from_folder(folder).apply(some, CPU, torch.float32)
    patches = patchify(pixels, oracle.config.vision_config).flatten(0, 1)
    grid = torch.tensor([[3, height // 16, width // 16]])
    with torch.inference_mode():
        theirs = oracle.model.get_video_features(patches, grid, return_dict=True)
    streams = [theirs.pooler_output[0], *(stream[0] for stream in theirs.deepstack_features)]
    assert encoded.shape == (3, height * width // 1024, 128)
    agree(encoded.flatten(0, 1), torch.cat(streams, dim=1), atol=1e-4, rtol=1e-4)


def test_each_pair_is_looked_at_by_itself(folder):
    tower, number = load_tower(str(folder)), 2 * PICTURES_PER_FORWARD["cpu"] + 4
    together = tower.encode(frames(number, 64, 96)).patches
    for picture in (0, number // 2 - 1):
        alone = tower.encode(frames(number, 64, 96)[2 * picture : 2 * picture + 2]).patches
        torch.testing.assert_close(alone[0], together[picture], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (100, 75), (320, 512)])
def test_a_still_is_a_pair_of_equal_frames_to_the_model_s_own_processor(folder, size):
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    picture = frames(1, *size)[0].numpy()
    theirs = processor(picture, return_tensors="pt")
    _, rows, columns = theirs.image_grid_thw[0].tolist()
    if (16 * rows, 16 * columns) != size:  # it resizes as PIL does; the frames that it is given here come so
        from PIL import Image

        picture = np.asarray(Image.fromarray(picture).resize((16 * columns, 16 * rows), Image.Resampling.BICUBIC))
    pair = torch.from_numpy(np.stack([picture, picture]))
    config = load_tower(str(folder))._config
    ours = patchify(Normalisation.from_folder(folder).apply(pair, CPU, torch.float32), config)
    torch.testing.assert_close(ours[0], theirs.pixel_values, atol=1e-6, rtol=0)


def test_a_recipe_fixes_the_grid(folder):
    spec = describe_tower(str(folder))
    assert (spec.patch_grid, spec.frame_size, spec.aspect) == (DEFAULT_GRID, (320, 512), "letterbox")
    assert (spec.dim, spec.num_streams, spec.metric_dim, spec.frames_per_picture) == (128, 4, 32, 2)
    recipe = long(spec)
    assert recipe.patches_per_segment == 5 * 160
    wide = from_settings({"patch_grid": [9, 16], "aspect": "stretch", "tokens_per_segment": 40}, spec)
    assert (wide.tower.frame_size, wide.tower.num_patches, wide.shown) == ((288, 512), 144, "decoder")
    assert wide.fingerprint != recipe.fingerprint
    for grid in ([9], [0, 4], [9, 1000], "9x16", [9.5, 16]):
        with pytest.raises(InputError, match="write rows and columns of patch tokens such as"):
            from_settings({"patch_grid": grid}, spec)
    with pytest.raises(InputError, match="aspect is 'crop'; use one of stretch, letterbox"):
        from_settings({"aspect": "crop"}, spec)


@pytest.mark.parametrize(("number", "height", "width"), [(3, 64, 96), (2, 60, 96), (2, 64, 90)])
def test_what_makes_no_pictures_is_refused(folder, number, height, width):
    with pytest.raises(ValueError, match=r"frames of \d+ x \d+ pixels are no pictures of 2"):
        load_tower(str(folder)).encode(frames(number, height, width))


def test_a_config_that_describes_none_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "vision_config": {"depth": "deep"}}')
    with pytest.raises(InputError, match="describes no Qwen3-VL"):
        describe_tower(str(tmp_path))
