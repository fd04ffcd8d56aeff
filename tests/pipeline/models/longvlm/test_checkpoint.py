import json
import shutil

import pytest
import torch

from longvlm.pipeline.models.longvlm.checkpoint import find_checkpoint
from longvlm.schemas.errors import InputError


@pytest.fixture
def folder(untrained_folder, tmp_path):
    return shutil.copytree(untrained_folder, tmp_path / "model")


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


def test_a_folder_without_a_tokenizer_names_it(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"lacks tokenizer\.json"):
        find_checkpoint(str(folder))


def test_a_folder_without_a_config_names_it(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"lacks config\.json"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "siglip", "siglip2_vision_model"])
def test_a_vision_tower_is_told_apart(folder, kind):
    configure(folder, model_type=kind)
    with pytest.raises(InputError, match=r"is a vision tower .* answering needs a LongVLM or LLaVA"):
        find_checkpoint(str(folder))


def test_another_kind_of_model_is_refused(folder):
    configure(folder, model_type="qwen2")
    with pytest.raises(InputError, match="is of type qwen2, not a LongVLM"):
        find_checkpoint(str(folder))


def test_a_config_without_llama_s_fields_names_them(folder):
    configure(folder, model_type="llava", hidden_size=None, num_hidden_layers=None)
    with pytest.raises(InputError, match="lacks hidden_size, num_hidden_layers"):
        find_checkpoint(str(folder))


def test_a_projector_that_does_not_exist_is_named(folder):
    with pytest.raises(InputError, match=r"the projector nowhere\.bin does not exist"):
        find_checkpoint(str(folder), "nowhere.bin")


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_damaged_projector_is_named(folder, name):
    (folder / name).write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=rf"the projector .*{name} cannot be read"):
        find_checkpoint(str(folder)).projector_tensors()


class Malicious:
    def __reduce__(self):
        return print, ("code in a checkpoint was run",)


@pytest.mark.parametrize("name", ["mm_projector.bin", "pytorch_model.bin"])
def test_a_pickle_with_code_in_it_is_never_run(folder, name, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({"model.mm_projector.weight": Malicious()}, folder / name)
    checkpoint = find_checkpoint(str(folder))
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        checkpoint.projector_tensors() if name.startswith("mm") else checkpoint.tensors()
    assert capsys.readouterr().out == ""


def test_the_tower_is_a_hub_id_or_a_folder(folder, tmp_path):
    assert find_checkpoint(str(folder)).tower == str(folder / "tower")
    configure(folder, mm_vision_tower=str(tmp_path))
    assert find_checkpoint(str(folder)).tower == str(tmp_path)
    configure(folder, mm_vision_tower="openai/clip-vit-large-patch14")
    assert find_checkpoint(str(folder)).tower == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize("tower", ["/nowhere/at/all", "./lost"])
def test_a_tower_that_does_not_exist_is_named(folder, tower):
    configure(folder, mm_vision_tower=tower)
    with pytest.raises(InputError, match=f"the vision tower {tower}, which config.json of .* names, does not exist"):
        _ = find_checkpoint(str(folder)).tower


def test_a_config_without_a_tower_says_what_to_add(folder):
    configure(folder, mm_vision_tower=None)
    with pytest.raises(InputError, match='add for example "mm_vision_tower"'):
        _ = find_checkpoint(str(folder)).tower


@pytest.mark.parametrize("temperature", [0, -1, "2", True, float("inf")])
def test_a_temperature_that_is_none_is_refused(folder, temperature):
    assert find_checkpoint(str(folder)).option_temperature == 1.0
    configure(folder, mm_option_temperature=2)
    assert find_checkpoint(str(folder)).option_temperature == 2.0
    configure(folder, mm_option_temperature=temperature)
    with pytest.raises(InputError, match="must be a positive number"):
        find_checkpoint(str(folder)).option_temperature  # noqa: B018 - it is checked when it is read
