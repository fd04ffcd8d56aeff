import json

import pytest

from jobs.models import choose_answer_model, choose_index_recipe, tower_of
from models import save_clip_tower
from pipeline.language.untrained import build_untrained
from pipeline.store.ledger import Store
from schemas.errors import InputError


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
    assert tower_of(model) == f"{model}/tower"


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
    with pytest.raises(InputError, match="reads tokens 128 wide"):
        choose_answer_model(store, str(tmp_path / "wide"))
