"""Which model and recipe a run uses: what the user named, or what the store remembers."""

import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from longvlm import tinyworld
from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.models.families import can_answer, describe_model, sight_of
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store.ledger import RegisteredRecipe, Store
from longvlm.pipeline.vision.towers.families import describe_tower
from longvlm.schemas import training
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import RECIPES, Decode, IndexRecipe, from_settings

SHIPPED = "tinyworld"
TRY_MODELS = (
    "openai/clip-vit-large-patch14 or google/siglip-so400m-patch14-384 (a tower), llava-hf/llava-1.5-7b-hf or "
    "Qwen/Qwen3-VL-2B-Instruct, or the folder of a LongVLM checkpoint"
)


def absolute(model: str) -> str:
    """A model's folder as a path that holds in other processes and wherever the store is used from next.

    A hub id stays as it is, and SHIPPED is the model that comes with the project, unless a model of that name is here.
    """
    folder = Path(os.path.expanduser(model))  # noqa: PTH111 - never raises
    if model == SHIPPED and not (folder / "config.json").is_file():
        return tinyworld.MODEL
    return str(folder.resolve()) if folder.exists() else model


def choose_index_recipe(
    store: Store | None, model: str | None, recipe: str | None, decode: Decode | None
) -> tuple[IndexRecipe, str]:
    """The recipe of an index run and the model it is made for.

    What is not named comes from the store's active recipe: its model, and the recipe itself as long as the tower is the
    same one and the model can read what the recipe keeps. Any other recipe keeps the tower's layer that the model's
    projector reads, and no global tokens where it reads none, unless a recipe file says otherwise.

    Raises:
        InputError: no model is named and none remembered, or the recipe cannot be carried out with its tower.
    """
    active = store.active_recipe() if store else None
    if model is not None:
        model = absolute(model)
        sight = _sight(model)
        tower = describe_tower(sight.tower if sight else model)
        can_read = active is not None and (model == active.model or not sight or misfit(sight, active.recipe) is None)
    elif active is not None:
        model, tower, can_read = active.model, describe_tower(active.recipe.tower.name), True
    else:
        raise InputError(f"a new store needs a model to look at videos with: pass --model, for example {TRY_MODELS}.")
    if recipe is None and active and active.recipe.tower.weights == tower.weights and can_read:
        return _decoded(active.recipe, decode), model
    settings = {**_needs(_sight(model)), **_settings(recipe or _default_recipe(model), RECIPES)}
    return _decoded(from_settings(settings, tower), decode), model


def _sight(model: str) -> Sight | None:
    """What a model sees a video through; None where it is a bare tower, which looks for itself and reads nothing."""
    return sight_of(model) if can_answer(model) else None


def _default_recipe(model: str) -> str:
    """What videos are indexed with where nobody says: the shipped model was trained on one recipe, its own."""
    return tinyworld.RECIPE if model == tinyworld.MODEL else "long"


def _needs(sight: Sight | None) -> dict[str, object]:
    """What a recipe keeps for a model, as settings. With global tokens it reads, all recipes keep as many already."""
    if sight is None:
        return {}
    return {"feature_layer": sight.feature_layer, **({} if sight.num_global_tokens else {"num_global_layers": 0})}


def _decoded(recipe: IndexRecipe, decode: Decode | None) -> IndexRecipe:
    """A recipe with another way of decoding, and the name that says so."""
    if not decode or decode == recipe.decode:
        return recipe
    name = recipe.name.removesuffix("-keyframe") + ("-keyframe" if decode == "keyframe" else "")
    return replace(recipe, decode=decode, name=name)


def choose_train_recipe(recipe: str) -> training.TrainRecipe:
    """A training recipe by its name or out of a file.

    Raises:
        InputError: there is none, or it cannot be carried out.
    """
    return training.from_settings(_settings(recipe, training.RECIPES))


def _settings(recipe: str, known: Iterable[str]) -> dict[str, object]:
    """What `from_settings` makes a recipe of, by its name or out of a file."""
    if recipe in known:
        return {"base": recipe, "name": recipe}
    path = Path(recipe)
    if not path.is_file():
        raise InputError(f"there is no recipe {recipe}: name one of {', '.join(known)}, or a TOML or JSON file.")
    try:
        settings = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe file {recipe} cannot be read ({error}); write TOML or JSON.") from error
    if not isinstance(settings, dict):
        raise InputError(f"the recipe file {recipe} must hold settings by name, such as tokens_per_segment = 40.")
    return {"name": path.stem, **settings}


def choose_answer_model(store: Store, model: str | None) -> tuple[ModelSpec, RegisteredRecipe]:
    """The model of an answer run and the stored recipe whose tokens it can read: the active one, or else the newest.

    Raises:
        InputError: the store holds nothing yet, no model can answer, or no recipe of the store fits it.
    """
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    model = absolute(model) if model else active.model
    spec = describe_model(model)
    recipes = sorted(store.recipes(), key=lambda stored: (not stored.active, -stored.registered_seq))
    of_tower = _of_tower(spec.sight.tower, recipes)
    if not of_tower:
        raise InputError(
            f"the model {model} looks through the tower {spec.sight.tower}, but the store was indexed with "
            f"{active.recipe.tower.name}; answer with a model of that tower, or index again with "
            f"--model {model} --restale."
        )
    faults = [misfit(spec.sight, stored.recipe, spec.mm_hidden_size) for stored in of_tower]
    fitting = [stored for stored, fault in zip(of_tower, faults, strict=True) if fault is None]
    if not fitting:
        raise InputError(
            f"the model {model} reads {faults[0]}; choose a model for these tokens of "
            f"{of_tower[0].recipe.tower.name}, or index again with --model {model} --restale."
        )
    return replace(spec, sight=spec.sight.reading(fitting[0].recipe.tower)), fitting[0]


def _of_tower(tower: str, recipes: list[RegisteredRecipe]) -> list[RegisteredRecipe]:
    """The recipes whose tokens come from a tower: by its name on the hub, or else by its weights.

    Answering needs to know which tower it was, not to fetch it.
    """
    if not Path(tower).is_dir() and (same := [stored for stored in recipes if stored.recipe.tower.name == tower]):
        return same
    try:
        weights = describe_tower(tower).weights
    except InputError:  # it is neither here nor on a hub within reach, so nothing says that any is the same
        return []
    return [stored for stored in recipes if stored.recipe.tower.weights == weights]


def misfit(sight: Sight, recipe: IndexRecipe, width: int | None = None) -> str | None:
    """What a model would read in place of what a recipe of its tower holds; None where it can read that.

    A model that reads no global tokens leaves those of a recipe out.
    """
    held = f"but the recipe {recipe.name} of the store holds"
    if width not in (None, recipe.tower.dim):
        return f"tokens {width} wide, {held} tokens {recipe.tower.dim} wide"
    num_states = recipe.tower.num_layers + 1
    if sight.feature_layer % num_states != recipe.feature_layer % num_states:
        return f"hidden state {sight.feature_layer} of its tower, {held} hidden state {recipe.feature_layer}"
    if sight.num_global_tokens not in (0, recipe.num_global_layers):
        return f"{sight.num_global_tokens} global tokens a video, {held} {recipe.num_global_layers}"
    return None
