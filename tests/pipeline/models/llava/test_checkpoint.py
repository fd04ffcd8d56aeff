import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvlm.pipeline.models.llava.checkpoint import find_llava
from longvlm.pipeline.models.llava.model import describe_llava, load_llava
from longvlm.schemas.errors import InputError
from models import save_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("llava") / "llava")


@pytest.fixture
def folder(llava, tmp_path):
    return shutil.copytree(llava, tmp_path / "model")


def configure(folder, part=None, **changes):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    changed = change(dict(weights)) or weights
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.clone() for name, tensor in changed.items()}, folder / "model.safetensors")


def newer(tensors):
    """These tensors under the names that transformers gives them in memory since its version 4.52."""

    def rename(name):
        if name.startswith("language_model.model."):
            return f"model.language_model.{name.removeprefix('language_model.model.')}"
        return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"

    return {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["llava", "llava_next_video", "llava_onevision"])
def test_both_layouts_of_keys_are_the_same_model(tmp_path, family):
    folder = save_llava(tmp_path / family, family)
    names = set(load_file(folder / "model.safetensors"))
    assert "language_model.model.norm.weight" in names  # transformers still writes the older layout
    before = describe_llava(str(folder)).weights
    rewrite(folder, newer)
    assert "model.language_model.norm.weight" in load_file(folder / "model.safetensors")
    assert describe_llava(str(folder)).weights == before


def test_pickles_and_old_buffers_load_alike(folder, llava):
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert describe_llava(str(folder)).weights == describe_llava(str(llava)).weights


def test_tied_embeddings_need_no_head(tmp_path):
    folder = save_llava(tmp_path / "tied", tie_word_embeddings=True)
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    llm = load_llava(str(folder)).llm
    assert torch.equal(llm.lm_head.weight, llm.model.embed_tokens.weight)


def test_missing_and_unknown_tensors_are_listed(folder):
    def change(tensors):
        del tensors["language_model.model.norm.weight"], tensors["multi_modal_projector.linear_2.bias"]
        return {**tensors, "language_model.model.rogue": torch.ones(1), "vision_resampler.pool.bias": torch.ones(1)}

    rewrite(folder, change)
    sentence = (
        r"lack model\.norm\.weight, multi_modal_projector\.linear_2\.bias and also hold model\.rogue, vision_resampler"
    )
    for read in (describe_llava, load_llava):
        with pytest.raises(InputError, match=sentence):
            read(str(folder))


def test_a_tensor_of_another_shape_is_named(folder):
    rewrite(folder, lambda tensors: {**tensors, "multi_modal_projector.linear_1.bias": torch.ones(7)})
    with pytest.raises(InputError, match=r"hold multi_modal_projector\.linear_1\.bias as \[7\] instead of \[64\]"):
        load_llava(str(folder))


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (None, {"vision_feature_layer": [-2, -5]}, "reads 2 layers of its tower side by side"),
        (None, {"vision_feature_select_strategy": "full"}, "'full': with a tower of type clip_vision_model its proj"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "'default': .* it drops a patch where CLS would be"),
        ("vision_config", {"model_type": "pixtral"}, "is of type pixtral, and videos are indexed with CLIP or SigLIP"),
        ("text_config", {"model_type": "gemma"}, "is of type gemma, which cannot be answered with; .* llama, mistral"),
        ("text_config", {"model_type": "mistral", "sliding_window": 99}, "attends to the last 99 tokens of its 4096"),
        ("text_config", {"num_attention_heads": "four"}, "describes no LLaVA"),
    ],
)
def test_configs_that_cannot_be_answered_with_are_refused_by_a_sentence(folder, part, changes, sentence):
    configure(folder, part, **changes)
    with pytest.raises(InputError, match=sentence):
        find_llava(str(folder))


def test_pooling_by_weights_is_refused(tmp_path):
    folder = save_llava(tmp_path / "next", "llava_next_video")
    configure(folder, spatial_pool_mode="conv")
    with pytest.raises(InputError, match="pools frames by 'conv'; choose one that pools by average or max"):
        find_llava(str(folder))


def test_a_place_that_the_tokenizer_does_not_know_is_refused(folder):
    configure(folder, image_token_index=9999)
    with pytest.raises(InputError, match=r"no single place for the image that its tokenizer and config\.json agree on"):
        describe_llava(str(folder))


def test_a_place_without_an_embedding_is_refused(folder):
    tokens = json.loads((folder / "config.json").read_text())["image_token_index"]
    configure(folder, "text_config", vocab_size=tokens)

    def change(tensors):
        cut = {name: tensor[:tokens] for name, tensor in tensors.items() if tensor.shape[0] == tokens + 7}
        return {**tensors, **cut}

    rewrite(folder, change)
    with pytest.raises(InputError, match=f"the token {tokens}, but its language model has {tokens} tokens"):
        describe_llava(str(folder))


def test_answers_end_as_the_checkpoint_says(folder):
    assert load_llava(str(folder)).eos_ids == (3,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 3]}))
    assert load_llava(str(folder)).eos_ids == (3, 9)
    (folder / "generation_config.json").unlink()
    configure(folder, "text_config", eos_token_id=7)
    assert load_llava(str(folder)).eos_ids == (7,)
    configure(folder, "text_config", eos_token_id=None)
    assert load_llava(str(folder)).eos_ids == (3,)  # the tokenizer's
