"""LongVLM as a family of models, and what any other config is taken for: its sentences say what is wanted."""

from pathlib import Path
from typing import Any

from longvlm.pipeline.models.contract import LanguageModel, ModelSpec, WholeModel
from longvlm.pipeline.models.longvlm.checkpoint import FAMILIES, find_checkpoint
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.recipe import Precision


def recognises(config: dict[str, Any]) -> bool:
    """Whether a config.json describes one."""
    return config.get("model_type") in FAMILIES


def sight(model: str) -> Sight:
    """See `families.sight_of`."""
    return find_checkpoint(model).sight


def describe(model: str) -> ModelSpec:
    """See `families.describe_model`."""
    from longvlm.pipeline.models.longvlm.model import describe_longvlm

    return describe_longvlm(model)


def load(model: str, precision: Precision, device: str) -> LanguageModel:
    """See `families.load_model`."""
    from longvlm.pipeline.models.longvlm.model import load_longvlm

    return load_longvlm(model, precision, device)


def load_whole(model: str, precision: Precision, device: str) -> WholeModel | None:  # noqa: ARG001 - see `families`
    """Transformers knows no LongVLM."""
    return None


def base_for_training(model: str, folder: Path, seed: int) -> str:
    """See `families.base_for_training`; of a bare language model, a LongVLM that is made in the folder."""
    from longvlm.pipeline.models.longvlm.init import begin, is_begun

    if is_begun(model):
        return model
    if not (folder / "config.json").is_file():
        begin(model, folder, seed)
    return str(folder)


def save(model: str, weights: TrainedWeights, template: str | None, folder: Path) -> None:
    """See `families.save`."""
    from longvlm.pipeline.models.longvlm.save import save_longvlm

    save_longvlm(model, weights, template, folder)
