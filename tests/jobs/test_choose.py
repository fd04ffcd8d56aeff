import json

import pytest
from safetensors.torch import load_file

from longvlm.jobs.choose import choose_answer_model, choose_index_recipe
from longvlm.pipeline.models.families import sight_of
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.vision.towers.families import describe_tower
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import from_settings, tiny
from models import save_clip_tower, save_llava


@pytest.fixture
def store(tmp_path):
    return Store.create(str(tmp_path / "store"))


def test_a_new_store_needs_a_model_and_the_sentence_names_real_ones():
    with pytest.raises(InputError, match="openai/clip-vit-large-patch14"):
        choose_index_recipe(None, None, None, None)


def test_the_default_recipe_is_long_and_the_store_remembers_what_was_chosen(store, model):
    recipe, named = choose_index_recipe(store, model, None, None)
    assert (recipe.name, recipe.segment_s, named) == ("long", 10.0, model)
    tiny, _ = choose_index_recipe(store, model, "tiny", "keyframe")
    assert tiny.name == "tiny-keyframe"
    store.register_recipe(tiny, model)
    assert choose_index_recipe(store, None, None, None) == (tiny, model)
    assert choose_index_recipe(store, None, None, "exact")[0].name == "tiny"


def test_a_relative_model_is_remembered_as_an_absolute_one(model, tmp_path, monkeypatch):
    save_clip_tower(tmp_path / "tower")
    monkeypatch.chdir(tmp_path)
    assert choose_index_recipe(None, "tower", None, None)[1] == str(tmp_path / "tower")
    assert sight_of(model).tower == f"{model}/tower"


def test_a_recipe_file_is_named_after_itself(tmp_path, model):
    (tmp_path / "dense.json").write_text(json.dumps({"base": "tiny", "tokens_per_segment": 16}))
    recipe, _ = choose_index_recipe(None, model, str(tmp_path / "dense.json"), None)
    assert (recipe.name, recipe.tokens_per_segment) == ("dense", 16)
    (tmp_path / "broken.toml").write_text("tokens_per_segment = ")
    with pytest.raises(InputError, match="cannot be read"):
        choose_index_recipe(None, model, str(tmp_path / "broken.toml"), None)


def test_an_answer_needs_tokens_of_the_models_own_tower(store, model, tmp_path):
    with pytest.raises(InputError, match="holds no videos yet"):
        choose_answer_model(store, model)
    store.register_recipe(choose_index_recipe(store, model, "tiny", None)[0], model)
    spec, stored = choose_answer_model(store, None)
    assert (spec.name, stored.name) == (model, "tiny")
    copy = save_clip_tower(tmp_path / "copy")  # the same weights in another folder
    build_untrained(tmp_path / "same", tower=str(copy), tower_dim=64)
    assert choose_answer_model(store, str(tmp_path / "same"))[1].fingerprint == stored.fingerprint
    build_untrained(tmp_path / "far", tower="somebody/other-tower", tower_dim=64)
    with pytest.raises(InputError, match="somebody/other-tower"):
        choose_answer_model(store, str(tmp_path / "far"))
    build_untrained(tmp_path / "wide", tower=str(copy), tower_dim=128)
    with pytest.raises(InputError, match=r"wide reads tokens 128 wide, but the recipe tiny .* holds tokens 64 wide"):
        choose_answer_model(store, str(tmp_path / "wide"))


def test_a_pinned_revision_is_part_of_a_model_s_name(store, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--org--name"
    for revision, commit, seed in (("main", "a" * 40, 1), ("v1.0", "b" * 40, 1), ("v2.0", "c" * 40, 2)):
        save_llava(cached / "snapshots" / commit, seed=seed)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe, named = choose_index_recipe(store, "org/name@v1.0", "tiny", None)
    assert named == recipe.tower.name == "org/name@v1.0"
    store.register_recipe(recipe, named)
    assert store.active_recipe().model == "org/name@v1.0"
    for model in (None, "org/name@v1.0", f"org/name@{'b' * 40}", "org/name"):  # the same weights
        spec, stored = choose_answer_model(store, model)
        assert (spec.name, stored.fingerprint) == (model or "org/name@v1.0", recipe.fingerprint)
        assert spec.sight.tower == spec.name
    with pytest.raises(
        InputError, match=r"org/name@v2\.0 looks through the tower org/name@v2\.0, but .* org/name@v1\.0"
    ):
        choose_answer_model(store, "org/name@v2.0")


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return str(save_llava(tmp_path_factory.mktemp("models") / "onevision", "llava_onevision"))


@pytest.fixture(scope="module")
def llavas(tmp_path_factory, model):
    """LLaVA-1.5 and LLaVA-NeXT-Video over the CLIP that also the LongVLM of `model` looks through."""
    weights = load_file(f"{model}/tower/model.safetensors").items()
    names = "vision_model."
    tower = {name.removeprefix(names): tensor for name, tensor in weights if name.startswith(names)}
    folder = tmp_path_factory.mktemp("models")
    families = ("llava", "llava_next_video")
    return [str(save_llava(folder / family, family, tower=tower, seed=1)) for family in families]


def test_a_llava_is_its_own_tower_and_sets_its_layer_and_no_global_tokens(onevision, model):
    assert sight_of(onevision).tower == onevision
    for name in ("paper", "long", "tiny"):
        recipe, _ = choose_index_recipe(None, onevision, name, None)
        assert (recipe.name, recipe.feature_layer, recipe.num_global_layers) == (name, -1, 0)
    assert choose_index_recipe(None, onevision, None, None)[0].name == "long"
    assert choose_index_recipe(None, model, "tiny", None)[0].num_global_layers == 5


def test_a_recipe_file_may_keep_global_tokens_for_a_llava_too(llavas, tmp_path):
    (tmp_path / "both.toml").write_text('base = "tiny"\nnum_global_layers = 5\n')
    recipe, _ = choose_index_recipe(None, llavas[0], str(tmp_path / "both.toml"), None)
    assert (recipe.name, recipe.feature_layer, recipe.num_global_layers) == ("both", -2, 5)


def test_a_store_s_recipe_is_kept_for_every_model_that_can_read_it(store, model, llavas, tmp_path):
    tower = sight_of(model).tower
    full = choose_index_recipe(store, model, "tiny", None)[0]
    store.register_recipe(full, model)
    assert choose_index_recipe(store, llavas[0], None, None) == (full, llavas[0])
    assert choose_index_recipe(store, tower, None, None) == (full, tower)

    other = Store.create(str(tmp_path / "other"))
    bare = choose_index_recipe(other, llavas[0], "tiny", None)[0]
    other.register_recipe(bare, llavas[0])
    assert choose_index_recipe(other, llavas[1], None, None)[0] == bare
    assert choose_index_recipe(other, model, None, None)[0].num_global_layers == 5  # a LongVLM needs its global tokens


def test_checkpoints_that_share_a_tower_answer_one_store(store, model, llavas, tmp_path):
    store.register_recipe(choose_index_recipe(store, model, "tiny", None)[0], model)
    build_untrained(tmp_path / "tuned", tower=f"{model}/tower", tower_dim=64, seed=9)
    chosen = [choose_answer_model(store, name) for name in (model, str(tmp_path / "tuned"), *llavas)]
    assert len({stored.fingerprint for _, stored in chosen}) == 1
    assert len({spec.weights for spec, _ in chosen}) == len(chosen)
    assert [spec.family for spec, _ in chosen] == ["longvlm", "longvlm", "llava", "llava_next_video"]


def test_of_several_recipes_that_fit_the_active_one_is_read_or_else_the_newest(store, model, llavas):
    tower = describe_tower(f"{model}/tower")
    bare = choose_index_recipe(store, llavas[0], "tiny", None)[0]
    kept = {"early": 16, "late": 32}
    early, late = (from_settings({"base": "tiny", "name": n, "tokens_per_segment": k}, tower) for n, k in kept.items())
    for recipe in (bare, early, late):
        store.register_recipe(recipe, model)
    assert choose_answer_model(store, llavas[0])[1].recipe == bare
    assert choose_answer_model(store, model)[1].name == "late"
    store.promote("early")
    assert [choose_answer_model(store, name)[1].name for name in (model, llavas[0])] == ["early", "early"]


@pytest.mark.parametrize(
    ("settings", "reader", "sentence"),
    [
        ({"num_global_layers": 4}, "model", r"reads 5 global tokens a video, but the recipe odd .* holds 4; choose"),
        ({"feature_layer": -1}, "model", r"reads hidden state -2 of its tower, but the recipe odd .* hidden state -1"),
        ({"feature_layer": 2}, "llava", r"reads hidden state -2 of its tower, but the recipe odd .* hidden state 2"),
    ],
)
def test_tokens_that_a_projector_was_not_made_for_are_refused(store, model, llavas, settings, reader, sentence):
    tower = describe_tower(f"{model}/tower")
    store.register_recipe(from_settings({"base": "tiny", "name": "odd", **settings}, tower), f"{model}/tower")
    with pytest.raises(InputError, match=sentence):
        choose_answer_model(store, model if reader == "model" else llavas[0])


def test_a_layer_may_be_counted_from_either_end(store, model, llavas):
    tower = describe_tower(f"{model}/tower")
    store.register_recipe(from_settings({"base": "tiny", "feature_layer": tower.num_layers - 1}, tower), model)
    assert choose_answer_model(store, llavas[1])[0].name == llavas[1]


def test_a_model_of_another_tower_is_refused_by_a_sentence_that_names_both(store, model, onevision):
    store.register_recipe(tiny(describe_tower(f"{model}/tower")), model)
    with pytest.raises(InputError, match=rf"{onevision} looks through the tower .* indexed with {model}/tower"):
        choose_answer_model(store, onevision)
