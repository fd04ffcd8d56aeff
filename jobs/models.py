"""Which model and recipe a run uses: what the user named, or what the store remembers."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

from pipeline.language.checkpoint import find_checkpoint
from pipeline.language.longvlm import ModelSpec, describe_model, is_longvlm
from pipeline.store.ledger import RegisteredRecipe, Store
from pipeline.vision.encode import describe_tower
from schemas.errors import InputError
from schemas.recipe import RECIPES, Decode, IndexRecipe, from_settings, long

TRY_MODELS = (
    "openai/clip-vit-large-patch14 or google/siglip-so400m-patch14-384 (a tower), or the folder of a LongVLM checkpoint"
)


def tower_of(model: str) -> str:
    """The vision tower that a model looks through: the one its config names, or the model itself if it is a tower."""
    return find_checkpoint(model).tower if is_longvlm(model) else model


def absolute(model: str) -> str:
    """A model's folder as a path that holds wherever the store is used from next; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def choose_index_recipe(
    store: Store | None, model: str | None, recipe: str | None, decode: Decode | None
) -> tuple[IndexRecipe, str]:
    """The recipe of an index run and the model it is made for.

    What is not named comes from the store's active recipe: its model, and the recipe itself as long as the tower is the
    same one.

    Raises:
        InputError: no model is named and none remembered, or the recipe cannot be carried out with its tower.
    """
    active = store.active_recipe() if store else None
    if model is not None:
        model = absolute(model)
        tower_name = tower_of(model)
    elif active is not None:
        model, tower_name = active.model, active.recipe.tower.name
    else:
        raise InputError(f"a new store needs a model to look at videos with: pass --model, for example {TRY_MODELS}.")
    tower = describe_tower(tower_name)
    if recipe is not None:
        chosen = RECIPES[recipe](tower) if recipe in RECIPES else from_settings(_read_recipe_file(recipe), tower)
    elif active and active.recipe.tower.weights == tower.weights:
        chosen = active.recipe
    else:
        chosen = long(tower)
    if decode and decode != chosen.decode:
        name = chosen.name.removesuffix("-keyframe") + ("-keyframe" if decode == "keyframe" else "")
        chosen = replace(chosen, decode=decode, name=name)
    return chosen, model


def _read_recipe_file(recipe: str) -> dict[str, object]:
    path = Path(recipe)
    if not path.is_file():
        raise InputError(f"there is no recipe {recipe}: name one of {', '.join(RECIPES)}, or a TOML or JSON file.")
    try:
        settings = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe file {recipe} cannot be read ({error}); write TOML or JSON.") from error
    if not isinstance(settings, dict):
        raise InputError(f"the recipe file {recipe} must hold settings by name, such as tokens_per_segment = 40.")
    return {"name": path.stem, **settings}


def choose_answer_model(store: Store, model: str | None) -> tuple[ModelSpec, RegisteredRecipe]:
    """The model of an answer run and the stored recipe whose tokens it can read.

    Raises:
        InputError: the store holds nothing yet, no model can answer, or no recipe of the store comes from its tower.
    """
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    model = absolute(model) if model else active.model
    spec = describe_model(model)
    recipes = sorted(store.recipes(), key=lambda stored: (not stored.active, -stored.registered_seq))
    fitting = [stored for stored in recipes if _same_tower(spec.tower, stored.recipe)]
    if not fitting:
        raise InputError(
            f"the model {model} looks through the tower {spec.tower}, but the store was indexed with "
            f"{active.recipe.tower.name}; answer with a model of that tower, or index again with "
            f"--model {model} --restale."
        )
    chosen = fitting[0]
    if spec.mm_hidden_size != chosen.recipe.tower.dim:
        raise InputError(
            f"the projector of {model} reads tokens {spec.mm_hidden_size} wide, but the recipe {chosen.recipe.name} "
            f"of the store holds tokens {chosen.recipe.tower.dim} wide; choose a model for {chosen.recipe.tower.name}."
        )
    return spec, chosen


def _same_tower(tower: str, recipe: IndexRecipe) -> bool:
    """Whether a recipe's tokens come from a tower: by its name on the hub, or else by its weights."""
    if tower == recipe.tower.name and not Path(tower).is_dir():
        return True  # answering needs to know which tower it was, not to fetch it
    try:
        return describe_tower(tower).weights == recipe.tower.weights
    except InputError:  # it is neither here nor on a hub within reach, so nothing says that it is the same
        return False
