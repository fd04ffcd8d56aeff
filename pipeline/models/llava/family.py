"""Transformers' LLaVA family as a family of models."""

from pathlib import Path
from typing import Any

from longvlm.pipeline.models.contract import LanguageModel, ModelSpec, WholeModel
from longvlm.pipeline.models.llava.checkpoint import FAMILIES, find_llava
from longvlm.pipeline.models.saving import TrainedWeights, renamed, save_whole
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.recipe import Precision


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json is in transformers' layout: a LongVLM may call itself llava too, its fields unnested."""
    return config.get("model_type") in FAMILIES and "text_config" in config


def sight(model: str) -> Sight:
    """See `families.sight_of`."""
    return find_llava(model).sight


def describe(model: str) -> ModelSpec:
    """See `families.describe_model`."""
    from longvlm.pipeline.models.llava.model import describe_llava

    return describe_llava(model)


def load(model: str, precision: Precision, device: str) -> LanguageModel:
    """See `families.load_model`."""
    from longvlm.pipeline.models.llava.model import load_llava

    return load_llava(model, precision, device)


def load_whole(model: str, precision: Precision, device: str) -> WholeModel | None:
    """See `families.load_whole`."""
    from longvlm.pipeline.models.llava.whole import WholeLlava

    return WholeLlava(model, precision, device)


def base_for_training(model: str, folder: Path, seed: int) -> str:  # noqa: ARG001 - it is whole
    """See `families.base_for_training`."""
    return model


def save(model: str, weights: TrainedWeights, template: str | None, folder: Path) -> None:  # noqa: ARG001 - it has one
    """See `families.save`."""

    def in_checkpoint(name: str) -> str:
        return f"model.language_model.{name.removeprefix('model.')}"

    projector = {f"model.multi_modal_projector.{name}": tensor for name, tensor in weights.projector.items()}
    save_whole(find_llava(model), projector | renamed(weights, in_checkpoint), folder)
