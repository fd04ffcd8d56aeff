import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.models.families import describe_model, load_model
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.prompt import VIDEO_TOKENS
from longvlm.pipeline.training.card import ModelCard
from longvlm.pipeline.training.finetune import finetune
from longvlm.pipeline.training.packing import Example
from longvlm.pipeline.training.save import save_model
from longvlm.schemas.training import RECIPES
from models import LLAVAS
from support import lent

QUICK = {"precision": "float32", "gradient_checkpointing": False, "learning_rate": 1e-3, "warmup_ratio": 0.0}


def prefix(model):
    return VideoPrefix(torch.randn(8, model.mm_hidden_size, generator=torch.Generator().manual_seed(1)))


def trained(model, base="full", **changes):
    recipe = replace(RECIPES[base](), **QUICK, lora_rank=2, **changes)
    model = load_model(str(model))
    finetuner = finetune(model, [[Example(prefix(model), [(("What?", "red"),)])]] * 2, recipe, 2)
    weights = finetuner.trainable.trained_weights()
    return weights, recipe, finetuner.trainable.merge_and_unload()


def logits(model):
    rows = model.read(prefix(model)).embeds
    prompt = model.lay_out("What is it?", len(rows), model.templates[0])
    embeds = model.llm.get_input_embeddings()(torch.tensor(prompt.ids)).clone()
    embeds[prompt.first_patch : prompt.first_patch + prompt.num_patches] = rows
    with torch.no_grad():
        return model.llm(inputs_embeds=embeds[None]).logits[0]


def modes(folder):
    """Of its files: the umask of the tests lets others read."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("base", ["projector", "full", "lora"])
def test_a_longvlm_comes_back_with_tower_and_tokenizer(untrained_folder, tmp_path, base):
    weights, recipe, model = trained(untrained_folder, base, whiten=base == "full")
    save_model(weights, str(untrained_folder), ModelCard("m", recipe, 2, 1.5), tmp_path / "to")
    assert modes(tmp_path / "to") == {0o644}
    moved = shutil.move(tmp_path / "to", tmp_path / "elsewhere")
    found = load_model(str(moved))
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    spec = describe_model(str(moved))
    assert spec.sight.tower == str(tmp_path / "elsewhere" / "tower")
    assert spec.weights != describe_model(str(untrained_folder)).weights
    assert found.tokenizer.to_str() == load_model(str(untrained_folder)).tokenizer.to_str()


def test_a_temperature_that_was_measured_of_other_weights_is_left_behind(untrained_folder, tmp_path):
    calibrated = shutil.copytree(untrained_folder, tmp_path / "calibrated")
    config = json.loads((calibrated / "config.json").read_text())
    (calibrated / "config.json").write_text(json.dumps(config | {"mm_option_temperature": 2.5}))
    weights, recipe, _ = trained(calibrated)
    save_model(weights, str(calibrated), ModelCard("m", recipe, 2, 1.5), tmp_path / "to")
    found = [load_model(str(folder)).option_temperature for folder in (calibrated, tmp_path / "to")]
    assert found == [2.5, 1]


@pytest.mark.parametrize("family", list(LLAVAS))
def test_a_llava_comes_back_whole(folders, tmp_path, family):
    weights, recipe, model = trained(folders[family], "lora")
    save_model(weights, str(folders[family]), ModelCard("m", recipe, 2, 1.5), tmp_path / "to")
    assert modes(tmp_path / "to") == {0o644}
    found = load_model(str(tmp_path / "to"))
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-5)
    assert found.chat.template == model.chat.template
    assert found.eos_ids == model.eos_ids
    assert describe_model(str(tmp_path / "to")).family == family


@pytest.mark.parity
def test_a_base_with_its_projector_apart_becomes_one_checkpoint(golden, tmp_path):
    base = shutil.copytree(lent(golden.folder / "base"), tmp_path / "base")
    shutil.copy(golden.projector, base)
    weights, recipe, model = trained(base, "projector")
    save_model(weights, str(base), ModelCard("m", recipe, 2, 1.5), tmp_path / "to")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "to"))), logits(model), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "to" / "config.json").read_text())["vocab_size"] == golden.about["V"] + len(
        VIDEO_TOKENS
    )
