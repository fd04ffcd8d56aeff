import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvlm.pipeline.models.longvlm.model import EMBED, HEAD, PROJECT, PROJECT_BIAS, describe_longvlm, load_longvlm
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.errors import InputError
from support import lent


@pytest.fixture
def folder(untrained_folder, tmp_path):
    return shutil.copytree(untrained_folder, tmp_path / "model")


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return weights


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def base(folder):
    """The same model as a base without video tokens, and the projector file that training would have saved."""
    weights = load_file(folder / "model.safetensors")
    projector = {name: weights[name] for name in (PROJECT, PROJECT_BIAS, EMBED)}

    def shrink(tensors):
        for name in (EMBED, HEAD):
            tensors[name] = tensors[name][:-3]
        del tensors[PROJECT], tensors[PROJECT_BIAS]

    rewrite(folder, shrink)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "vid_" not in token["content"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "vocab_size": config["vocab_size"] - 3}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(projector, folder / "mm_projector.bin")
    return folder


def states(model):
    return {**model.llm.state_dict(), **{f"projector.{k}": v for k, v in model.projector.state_dict().items()}}


def assert_same(one, other):
    one, other = states(one), states(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_model_is_described_without_being_built(untrained_folder):
    spec = describe_longvlm(str(untrained_folder))
    assert (spec.mm_hidden_size, spec.context) == (64, 8192)
    assert spec.sight == Sight(str(untrained_folder / "tower"), -2, 5)
    assert (spec.templates[0], spec.family) == ("long_vlm_v1", "longvlm")
    assert spec.templates == load_longvlm(str(untrained_folder)).templates


def test_the_fingerprint_follows_the_weights_and_not_the_folder(untrained_folder, folder):
    weights = describe_longvlm(str(untrained_folder)).weights
    assert describe_longvlm(str(folder)).weights == weights
    rewrite(folder, lambda tensors: tensors[PROJECT].mul_(1.001))
    assert describe_longvlm(str(folder)).weights != weights


def test_the_fingerprint_follows_the_temperature_of_options_where_there_is_one(folder):
    weights, config = describe_longvlm(str(folder)).weights, json.loads((folder / "config.json").read_text())
    found = {}
    for temperature in (1, 1.5, 2):
        (folder / "config.json").write_text(json.dumps(config | {"mm_option_temperature": temperature}))
        found[temperature] = describe_longvlm(str(folder)).weights
        assert load_longvlm(str(folder)).option_temperature == temperature
    assert found[1] == weights
    assert len(set(found.values())) == 3


def test_base_and_projector_make_the_consolidated_model(untrained, untrained_folder, base, tmp_path):
    assert_same(load_longvlm(str(base)), untrained)
    assert describe_longvlm(str(base)).weights == describe_longvlm(str(untrained_folder)).weights
    elsewhere = shutil.move(base / "mm_projector.bin", tmp_path / "trained.bin")
    assert_same(load_longvlm(str(base), projector=str(elsewhere)), untrained)


def test_the_projector_file_overrides_what_the_weights_hold(folder, untrained):
    old = load_file(folder / "model.safetensors")
    save_file({PROJECT: old[PROJECT] * 2, PROJECT_BIAS: old[PROJECT_BIAS] + 1}, folder / "mm_projector.safetensors")
    model = load_longvlm(str(folder))
    assert torch.equal(model.projector.weight, untrained.projector.weight * 2)
    assert torch.equal(model.projector.bias, untrained.projector.bias + 1)


def test_shards_pickles_and_old_buffers_load_alike(folder, untrained):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same(load_longvlm(str(folder)), untrained)
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_longvlm(str(folder)), untrained)


@pytest.mark.parametrize("held", [EMBED, HEAD, "both"])
def test_tied_embeddings_are_one_under_either_name(folder, held):
    def change(tensors):
        tensors[HEAD] = tensors[EMBED].clone()
        if held != "both":
            del tensors[{EMBED: HEAD, HEAD: EMBED}[held]]

    configure(folder, tie_word_embeddings=True)
    rewrite(folder, change)
    model = load_longvlm(str(folder))
    assert model.llm.lm_head.weight.data_ptr() == model.llm.model.embed_tokens.weight.data_ptr()
    whole = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name in (EMBED, HEAD)}
    assert torch.equal(model.llm.lm_head.weight, next(iter(whole.values())))
    weights = describe_longvlm(str(folder)).weights
    rewrite(folder, lambda tensors: tensors.update({EMBED: tensors.pop(HEAD, None)} if held == HEAD else {}))
    assert describe_longvlm(str(folder)).weights == weights


@pytest.mark.parametrize(("eos", "found"), [(2, (2,)), ([2, 1], (2, 1)), ([999_999, 2], (2,))])
def test_answers_end_with_what_the_config_names_and_the_tokenizer_knows(folder, eos, found):
    configure(folder, eos_token_id=eos)
    assert load_longvlm(str(folder)).eos_ids == describe_longvlm(str(folder)).vocabulary.eos_ids == found


@pytest.mark.parametrize("eos", [999_999, [], None])
def test_an_end_mark_that_there_is_not_is_refused(folder, eos):
    configure(folder, eos_token_id=eos)
    with pytest.raises(InputError, match=r"config\.json of .* has the eos_token_id .*, which is no token of its"):
        describe_longvlm(str(folder))


def test_precision_is_taken_everywhere(untrained_folder):
    model = load_longvlm(str(untrained_folder), "bfloat16")
    assert {tensor.dtype for tensor in states(model).values()} == {torch.bfloat16}
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32


def test_missing_and_unknown_tensors_are_listed(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.vision_tower.weight"] = torch.ones(1)

    rewrite(folder, change)
    sentence = r"lack model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight and also hold model\.vision_tower"
    with pytest.raises(InputError, match=sentence):
        load_longvlm(str(folder))
    with pytest.raises(InputError, match=sentence):
        describe_longvlm(str(folder))


def test_a_tensor_of_another_shape_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(InputError, match=r"hold model\.norm\.weight as \[7\] instead of \[128\]"):
        load_longvlm(str(folder))


def test_a_config_that_describes_no_llama_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(InputError, match="describes no LLaMA"):
        load_longvlm(str(folder))


def test_a_model_without_a_projector_says_where_to_put_one(base):
    (base / "mm_projector.bin").unlink()
    with pytest.raises(InputError, match=r"has no projector .* put training's mm_projector\.bin beside"):
        describe_longvlm(str(base))


def test_a_base_whose_projector_file_lacks_trained_embeddings_is_refused(base):
    projector = torch.load(base / "mm_projector.bin", weights_only=True)
    del projector[EMBED]
    torch.save(projector, base / "mm_projector.bin")
    with pytest.raises(InputError, match=r"without trained embeddings of <vid_start>"):
        load_longvlm(str(base))


def test_a_projector_of_another_model_is_refused(base):
    projector = torch.load(base / "mm_projector.bin", weights_only=True)
    projector[EMBED] = projector[EMBED][:-1]
    torch.save(projector, base / "mm_projector.bin")
    with pytest.raises(InputError, match="was trained with embeddings"):
        load_longvlm(str(base))


def test_a_tokenizer_that_is_too_large_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1] for name in (EMBED, HEAD)}))
    with pytest.raises(InputError, match="take the tokenizer that belongs to the weights"):
        load_longvlm(str(folder))


@pytest.mark.parametrize("num_whole_frames", [None, 2])
def test_each_token_is_projected_by_itself_merged_or_not(untrained, num_whole_frames):
    prefix = torch.randn(6, 64).half()
    rows = untrained.read(VideoPrefix(prefix, num_whole_frames)).embeds
    assert torch.equal(rows, untrained.projector(prefix.float()))
    assert untrained.mm_hidden_size == 64


def test_prompts_and_options_continue_each_other(untrained):
    prompt = untrained.lay_out("Is it red?", 4, "long_vlm_v1")
    cue = untrained.tokenizer.encode("ASSISTANT:").ids
    for option, ids in zip(["yes", "a red ball"], untrained.option_ids(["yes", "a red ball"]), strict=True):
        whole = untrained.tokenizer.encode(f"ASSISTANT: {option}").ids
        assert (*cue, *ids) == tuple(whole)
        assert untrained.decode([*ids, 2]) == option
    assert prompt.ids[-len(cue) + 1 :] == tuple(cue[1:])


def test_a_template_that_the_model_lacks_is_refused(untrained):
    with pytest.raises(InputError, match="template 'chat' is not known; use one of long_vlm_v1"):
        untrained.lay_out("What?", 4, "chat")


@pytest.mark.parity
def test_pickled_weights_are_the_same_model(golden, tmp_path):
    lent(golden.folder / "full" / "pytorch_model.bin")
    folder = shutil.copytree(golden.folder / "full", tmp_path / "full", ignore=shutil.ignore_patterns("*.safetensors"))
    assert_same(load_longvlm(str(folder)), golden.models["full"])


@pytest.mark.parity
@pytest.mark.parametrize("projector", ["mm_projector.bin", "mm_projector.safetensors"])
def test_base_and_projector_equal_full(golden, projector):
    ours = states(load_longvlm(str(golden.folder / "base"), projector=str(lent(golden.folder / projector))))
    full = states(golden.models["full"])
    trained = golden.about["V"]
    assert ours.keys() == full.keys()
    for name, tensor in ours.items():
        rows = trained if name == HEAD else len(tensor)
        assert torch.equal(tensor[:rows], full[name][:rows]), name
