import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from reference_outputs import clip_cases
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from longvlm.pipeline.vision.pixels import Pixels
from longvlm.schemas.errors import InputError
from models import save_clip_tower, save_siglip_tower

CPU = torch.device("cpu")


@pytest.mark.parity
@pytest.mark.parametrize("reference", clip_cases())
def test_pixel_values_of_the_reference(reference):
    meta, golden, frames = reference.meta, reference.arrays, reference.frames
    assert hashlib.sha256(frames.numpy().tobytes()).hexdigest() == meta["frames224_sha256"]
    values = Pixels.from_folder(reference.folder / "model", meta["model"]["img"]).prepare(frames, CPU, torch.float32)
    assert list(values.shape) == meta["pixel_values"]["shape"]
    stored = golden["pixel_values_frame0"]
    stride = values.shape[-1] // stored.shape[-1]
    np.testing.assert_allclose(values[0, :, ::stride, ::stride], stored, atol=1e-6, rtol=0)
    np.testing.assert_allclose(values.double().sum(dim=(1, 2, 3)), golden["pixel_values_rowsum"], rtol=1e-5, atol=0.1)


@pytest.mark.parametrize("frame_px", [28, 56, 100, 224])
@pytest.mark.parametrize(
    ("save", "processor"), [(save_clip_tower, CLIPImageProcessorPil), (save_siglip_tower, SiglipImageProcessorPil)]
)
def test_the_same_as_the_models_own_processor(tmp_path, save, processor, frame_px):
    folder = save(tmp_path, image_size=56, text=False)
    frames = torch.randint(0, 256, (3, frame_px, frame_px, 3), dtype=torch.uint8)
    ours = Pixels.from_folder(folder, 56).prepare(frames, CPU, torch.float32)
    images = [Image.fromarray(frame) for frame in frames.numpy()]
    theirs = processor.from_pretrained(folder)(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_processor_that_resizes_beyond_the_crop_cuts_the_centre(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 32, "crop_size": 28, "do_center_crop": True, "image_mean": [0] * 3, "image_std": [1] * 3})
    )
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    ours = Pixels.from_folder(tmp_path, 28).prepare(frames, CPU, torch.float32)
    whole = np.asarray(Image.fromarray(frames[0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(ours[0].permute(1, 2, 0), whole[2:30, 2:30], atol=1e-6)


def test_a_video_model_s_own_settings_come_first_wherever_transformers_keeps_them(tmp_path):
    def settings(mean):
        return {"size": {"height": 56, "width": 56}, "image_mean": [mean] * 3, "image_std": [1] * 3, "crop_size": None}

    files = {
        "processor_config.json": {"image_processor": settings(1), "processor_class": "LlavaProcessor"},
        "preprocessor_config.json": settings(2),
        "video_preprocessor_config.json": settings(4),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
        expected = {"processor_config.json": 1, "preprocessor_config.json": 2, "video_preprocessor_config.json": 4}[
            name
        ]
        assert Pixels.from_folder(tmp_path, 56).normalisation.mean == (expected,) * 3
    (tmp_path / "video_preprocessor_config.json").unlink()
    both = {**files["processor_config.json"], "video_processor": settings(3)}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    assert Pixels.from_folder(tmp_path, 56).normalisation.mean == (3, 3, 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "lacks preprocessor_config.json"),
        ("{", "not valid JSON"),
        (json.dumps({"size": 56}), "lacks image_mean, image_std"),
        (json.dumps({"size": 64, "image_mean": [0] * 3, "image_std": [1] * 3}), "makes images of 64 px"),
        (json.dumps({"size": {"height": 56, "width": 64}, "image_mean": [0] * 3, "image_std": [1] * 3}), "of 0 px"),
    ],
)
def test_processor_files_that_cannot_work(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        Pixels.from_folder(tmp_path, 56)
