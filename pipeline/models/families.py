"""The model families, told apart by their config alone; docs/families.md says how to add one.

The code of language models takes seconds to load, so it is where one is described or built.
"""

from pathlib import Path
from types import ModuleType

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.models.contract import LanguageModel, ModelSpec, WholeModel
from longvlm.pipeline.models.llava import family as llava
from longvlm.pipeline.models.longvlm import family as longvlm
from longvlm.pipeline.models.qwen3_vl import family as qwen3_vl
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.models.smolvlm import family as smolvlm
from longvlm.schemas.recipe import Precision

_FAMILIES: tuple[ModuleType, ...] = (llava, qwen3_vl, smolvlm, longvlm)  # a config is of the first that knows it


def can_answer(model: str) -> bool:
    """Whether a folder or hub id holds a language model of a known family, and not a vision tower, by its config alone.

    Raises:
        InputError: there is no such model, or it has no config.json.
    """
    config = read_json(resolve(model), "config.json")
    return any(family.recognises(config) for family in _FAMILIES)


def sight_of(model: str) -> Sight:
    """What a model that can answer sees a video through, by its config alone: the `sight` of its spec.

    Raises:
        InputError: its config says that tokens cannot be stored for it.
    """
    sight: Sight = family_of(model).sight(model)
    return sight


def describe_model(model: str) -> ModelSpec:
    """What a model is, without building it; its weights are only mapped and hashed.

    Raises:
        InputError: the model lacks something, or belongs to no known family.
    """
    spec: ModelSpec = family_of(model).describe(model)
    return spec


def load_model(model: str, precision: Precision = "float32", device: str = "cpu") -> LanguageModel:
    """A model on a device.

    Raises:
        InputError: as `describe_model`.
    """
    loaded: LanguageModel = family_of(model).load(model, precision, device)
    return loaded


def load_whole(model: str, precision: Precision = "float32", device: str = "cpu") -> WholeModel | None:
    """A model with its tower as transformers runs it over frames; None where transformers does not know it as a whole.

    Raises:
        InputError: as `describe_model`.
    """
    whole: WholeModel | None = family_of(model).load_whole(model, precision, device)
    return whole


def base_for_training(model: str, folder: Path, seed: int) -> str:
    """The model to train: itself, or what has to be added to it first, made in a folder by a seed.

    Raises:
        InputError: as `describe_model`.
    """
    base: str = family_of(model).base_for_training(model, folder, seed)
    return base


def save(model: str, weights: TrainedWeights, template: str | None, folder: Path) -> None:
    """Write a whole checkpoint: trained tensors among those of the model that was trained, in the types they had there.

    Args:
        model: what was trained; it is read once more from where it lies.
        weights: what training changed.
        template: that it was trained with, where the model lets one choose.
        folder: where to.

    Raises:
        InputError: the model is gone or broken.
    """
    family_of(model).save(model, weights, template, folder)


def family_of(model: str) -> ModuleType:
    """The module of a model's family; LongVLM's, whose sentences say what is wanted, where none knows its config."""
    config = read_json(resolve(model), "config.json")
    return next((family for family in _FAMILIES if family.recognises(config)), longvlm)
