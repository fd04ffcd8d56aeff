import json
import shutil

import pytest
import torch
from reference_outputs import clip_cases
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel, SiglipModel, SiglipVisionModel
from transformers.utils import logging

from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.pipeline.vision.towers.clip_tower import FRAMES_PER_FORWARD
from longvlm.pipeline.vision.towers.families import describe_tower, load_tower
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import paper
from models import save_clip_tower, save_llava, save_siglip_tower

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip_tower(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return save_siglip_tower(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def frames():
    return torch.randint(0, 256, (11, 56, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def hidden_states(model, tower, frames):
    """Transformers' own, on the CPU."""
    pixels = tower.pixels.prepare(frames, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        return model(pixels, output_hidden_states=True).hidden_states, pixels


@pytest.mark.parity
@pytest.mark.parametrize("reference", clip_cases())
def test_features_of_the_reference(reference, device, agree):
    golden, tower = reference.arrays, load_tower(str(reference.folder / "model"), device=device)
    encoded = tower.encode(reference.frames, num_global_layers=golden["hidden_cls"].shape[1])
    agree(encoded.cls, golden["hidden_cls"], atol=1e-4)
    agree(encoded.cls.mean(dim=0), golden["memory"], atol=1e-4)
    first = golden["hidden_m2_frame0"]
    agree(encoded.patches[0, :, : first.shape[1]], first[1:], atol=1e-4)
    if "hidden_m2_patches" in golden:
        agree(encoded.patches, golden["hidden_m2_patches"], atol=1e-4)


@pytest.fixture(scope="module")
def clip_states(clip, frames, device):
    """A CLIP's tower, and the hidden states of transformers' own."""
    tower = load_tower(str(clip), device=device)
    return tower, hidden_states(CLIPModel.from_pretrained(clip).vision_model, tower, frames)[0]


@pytest.mark.parametrize("feature_layer", [-2, -1, 0, 2, -5])
@pytest.mark.parametrize("num_global", [5, 2, 0])
def test_clip_states_are_those_of_transformers(clip_states, frames, feature_layer, num_global, agree):
    tower, states = clip_states
    encoded = tower.encode(frames, feature_layer, num_global)
    agree(encoded.patches, states[feature_layer][:, 1:], atol=1e-5, rtol=1e-5)
    if num_global:
        cls = torch.stack([state[:, 0] for state in states[-num_global:]], dim=1)
        agree(encoded.cls, cls, atol=1e-5, rtol=1e-5)
    else:
        assert encoded.cls is None


@pytest.mark.parametrize("feature_layer", [-2, -1])
def test_siglip_states_and_embedding_are_those_of_transformers(siglip, frames, feature_layer, device, agree):
    tower, model = load_tower(str(siglip), device=device), SiglipModel.from_pretrained(siglip)
    states, pixels = hidden_states(model.vision_model, tower, frames)
    encoded = tower.encode(frames, feature_layer)
    assert encoded.cls is None
    agree(encoded.patches, states[feature_layer], atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        pooled = model.get_image_features(pixel_values=pixels).pooler_output
    agree(encoded.embedding, torch.nn.functional.normalize(pooled, dim=-1), atol=1e-5, rtol=1e-5)


def test_clip_search_embeddings_are_those_of_transformers(clip, frames, device, agree):
    tower, model = load_tower(str(clip), device=device), CLIPModel.from_pretrained(clip)
    _, pixels = hidden_states(model.vision_model, tower, frames)
    with torch.inference_mode():
        pooled = model.get_image_features(pixel_values=pixels).pooler_output
    want = torch.nn.functional.normalize(pooled, dim=-1)
    for feature_layer in (-2, -1):
        embedding = tower.encode(frames, feature_layer).embedding
        agree(embedding, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_text_embeddings_are_those_of_transformers(kind, request):
    folder = request.getfixturevalue(kind)
    model = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(folder)
    texts = ["a dog", "Zwei Hunde laufen über die Straße", "a very long text " * 30, ""]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
    vectors = load_text_encoder(str(folder)).encode(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text, truncation=True, return_tensors="pt", **padding).input_ids
        with torch.inference_mode():
            want = model.get_text_features(input_ids=ids).pooler_output[0]
        torch.testing.assert_close(vector, want / want.norm(), atol=1e-5, rtol=1e-5)
    assert vectors.dtype == torch.float32


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_precisions_point_the_same_way(kind, frames, precision, device, request):
    folder = str(request.getfixturevalue(kind))
    wide, narrow = load_tower(folder).encode(frames), load_tower(folder, precision, device).encode(frames)
    assert narrow.patches.dtype == getattr(torch, precision)
    for part in ("patches", "cls", "embedding") if kind == "clip" else ("patches", "embedding"):
        expected, found = getattr(wide, part), getattr(narrow, part).cpu().float()
        assert found.isfinite().all()
        assert torch.cosine_similarity(expected, found, dim=-1).min() > 0.999, part


def test_frames_do_not_depend_on_how_many_go_forward_at_once(clip, frames, monkeypatch, device):
    tower = load_tower(str(clip), device=device)
    together = tower.encode(frames)
    monkeypatch.setitem(FRAMES_PER_FORWARD, device.type, 3)
    apart = tower.encode(frames)
    torch.testing.assert_close(together.patches, apart.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.cls, apart.cls, atol=1e-5, rtol=1e-5)
    assert repr(apart) == "Encoded(patches=(11, 16, 64), cls=(11, 5, 64), embedding=(11, 32))"


def test_a_tower_describes_itself(clip, siglip):
    spec = describe_tower(str(clip))
    assert (spec.num_layers, spec.patch_grid, spec.dim, spec.image_size) == (4, (4, 4), 64, 56)
    assert (spec.has_cls, spec.search_dim) == (True, 32)
    assert load_tower(str(clip)).spec == spec
    assert paper(spec).num_global_layers == 5
    pooled = describe_tower(str(siglip))
    assert (pooled.has_cls, pooled.search_dim) == (False, 64)


@pytest.mark.parametrize(
    ("save", "model_class"), [(save_clip_tower, CLIPVisionModel), (save_siglip_tower, SiglipVisionModel)]
)
def test_the_same_tower_is_recognised_alone_together_inside_and_in_shards(tmp_path, save, model_class):
    whole = save(tmp_path / "whole")
    alone = save(tmp_path / "alone", text=False)
    want = describe_tower(str(whole))
    assert describe_tower(str(alone)).weights == want.weights
    assert describe_tower(str(alone)).search_dim is None

    shards = shutil.copytree(alone, tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    model_class.from_pretrained(alone).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert describe_tower(str(shards)).weights == want.weights

    inside = shutil.copytree(whole, tmp_path / "inside")
    tensors = load_file(alone / "model.safetensors")
    names = {f"model.vision_tower.vision_model.{name}": tensor for name, tensor in tensors.items()}
    positions = {"model.vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(names | positions | {"model.embed_tokens.weight": torch.ones(3)}, inside / "model.safetensors")
    vision = json.loads((alone / "config.json").read_text())
    (inside / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": vision}))
    assert describe_tower(str(inside)).weights == want.weights

    other = save(tmp_path / "other", seed=1)
    assert describe_tower(str(other)).weights != want.weights


@pytest.mark.parametrize("family", ["llava", "llava_next_video", "llava_onevision"])
def test_a_llava_is_a_tower_too_and_the_same_one_as_outside(tmp_path, family):
    save = save_siglip_tower if family == "llava_onevision" else save_clip_tower
    alone = save(tmp_path / "alone", image_size=70, text=False)
    tensors = load_file(alone / "model.safetensors")
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items() if "head." not in name}
    llava = save_llava(tmp_path / "llava", family, image_size=70, tower=tensors)
    inside, outside = describe_tower(str(llava)), describe_tower(str(alone))
    assert inside.weights == outside.weights
    assert (inside.patch_grid, inside.has_cls, inside.search_dim) == ((5, 5), family != "llava_onevision", None)

    older = shutil.copytree(llava, tmp_path / "older")  # as published: the tower one level deeper, positions among it
    weights = load_file(llava / "model.safetensors")
    older_names = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()
    }
    older_names["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    (older / "model.safetensors").unlink()
    save_file(older_names, older / "model.safetensors")
    assert describe_tower(str(older)).weights == inside.weights

    frames = torch.randint(0, 256, (2, 70, 70, 3), dtype=torch.uint8)
    towers = [load_tower(str(folder)) for folder in (llava, older, alone)]
    first, *others = [tower.encode(frames, -1, 0) for tower in towers]
    assert all(torch.equal(first.patches, other.patches) for other in others)
    assert first.embedding is None


def test_the_pooling_head_does_not_make_another_tower(tmp_path, siglip):
    headless = shutil.copytree(siglip, tmp_path / "headless")
    tensors = {n: t for n, t in load_file(siglip / "model.safetensors").items() if ".head." not in n}
    (headless / "model.safetensors").unlink()
    save_file(tensors, headless / "model.safetensors")
    assert describe_tower(str(headless)).weights == describe_tower(str(siglip)).weights
    assert describe_tower(str(headless)).search_dim is None


def test_what_a_folder_lacks_is_named(tmp_path, clip):
    for missing in ("config.json", "preprocessor_config.json", "model.safetensors"):
        folder = shutil.copytree(clip, tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(InputError, match=missing):
            describe_tower(str(folder))
        with pytest.raises(InputError, match=missing):
            load_tower(str(folder))


def test_models_without_a_known_tower_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match=r"type llama, .* CLIP or SigLIP"):
        describe_tower(str(tmp_path))


def with_vision(folder, copy, **fields):
    """A copy of a whole model whose tower is configured otherwise."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"] |= fields
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": "64"}, "the hidden_size '64', which must be a positive whole number"),
        ({"image_size": [56, 56]}, r"the image_size \[56, 56\], which must be"),
        ({"num_attention_heads": 7}, "64 channels in 7 heads"),
        ({"patch_size": 112}, "56 pixels in patches of 112"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' .* one of quick_gelu, silu, gelu, gelu_pytorch_tanh"),
        ({"layer_norm_eps": None}, "layer_norm_eps None"),
        ({"model_type": "vit"}, "type vit, which has no vision tower known here"),
    ],
)
def test_a_config_of_no_such_tower_is_refused(tmp_path, clip, fields, says):
    with pytest.raises(InputError, match=says):
        describe_tower(str(with_vision(clip, tmp_path / "other", **fields)))


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_other_activations_are_those_of_transformers(tmp_path, clip, frames, activation):
    folder = with_vision(clip, tmp_path / "other", hidden_act=activation)
    tower = load_tower(str(folder))
    states, _ = hidden_states(CLIPModel.from_pretrained(folder).vision_model, tower, frames)
    torch.testing.assert_close(tower.encode(frames, -1).patches, states[-1][:, 1:], atol=1e-5, rtol=1e-5)


def test_searching_needs_a_text_part_with_its_tokenizer(tmp_path, clip):
    with pytest.raises(InputError, match=r"no text encoder.*CLIPModel or SiglipModel"):
        load_text_encoder(str(save_clip_tower(tmp_path / "alone", text=False)))
    folder = shutil.copytree(clip, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"lacks a tokenizer; copy tokenizer\.json"):
        load_text_encoder(str(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer in .* cannot be loaded"):
        load_text_encoder(str(folder))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loading_is_silent(kind, request, capfd):
    folder = request.getfixturevalue(kind)
    load_tower(str(folder))
    load_text_encoder(str(folder)).encode(["a dog"])
    assert capfd.readouterr() == ("", "")
