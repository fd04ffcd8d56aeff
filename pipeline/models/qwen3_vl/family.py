"""Qwen3-VL as a family of models."""

from pathlib import Path
from typing import Any

from longvlm.pipeline.models.contract import LanguageModel, ModelSpec, WholeModel
from longvlm.pipeline.models.qwen3_vl.checkpoint import MODEL_TYPE, QwenCheckpoint
from longvlm.pipeline.models.saving import TrainedWeights, renamed, save_whole
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.recipe import Precision


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json describes one."""
    return config.get("model_type") == MODEL_TYPE


def sight(model: str) -> Sight:
    """See `families.sight_of`."""
    return QwenCheckpoint.find(model).sight


def describe(model: str) -> ModelSpec:
    """See `families.describe_model`."""
    from longvlm.pipeline.models.qwen3_vl.model import describe_qwen

    return describe_qwen(model)


def load(model: str, precision: Precision, device: str) -> LanguageModel:
    """See `families.load_model`."""
    from longvlm.pipeline.models.qwen3_vl.model import load_qwen

    return load_qwen(model, precision, device)


def load_whole(model: str, precision: Precision, device: str) -> WholeModel | None:
    """See `families.load_whole`."""
    from longvlm.pipeline.models.qwen3_vl.whole import WholeQwen

    return WholeQwen(QwenCheckpoint.find(model), precision, device)


def base_for_training(model: str, folder: Path, seed: int) -> str:  # noqa: ARG001 - it is whole
    """See `families.base_for_training`."""
    return model


def save(model: str, weights: TrainedWeights, template: str | None, folder: Path) -> None:  # noqa: ARG001 - it has one
    """See `families.save`."""

    def in_checkpoint(name: str) -> str:
        return f"model.language_model.{name.removeprefix('model.')}"

    save_whole(QwenCheckpoint.find(model), renamed(weights, in_checkpoint), folder)
