"""Saving trained models: whole checkpoints in the layout of the one they come from, with a model card."""

from pathlib import Path

from longvlm.pipeline.models.families import save
from longvlm.pipeline.models.saving import TrainedWeights
from longvlm.pipeline.training.card import CARD, ModelCard


def save_model(weights: TrainedWeights, model: str, card: ModelCard, folder: Path) -> None:
    """Write a whole checkpoint that `answer` loads: the trained tensors among those of the model that was trained.

    Tensors keep the type that they had on disk.

    Args:
        weights: from `TrainableModel.trained_weights`.
        model: what was trained; it is read once more from where it lies.
        card: of the result.
        folder: where to; files of the same names are replaced.

    Raises:
        InputError: the model is gone or broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save(model, weights, card.recipe.template, folder)
    (folder / CARD).write_text(card.as_markdown())
