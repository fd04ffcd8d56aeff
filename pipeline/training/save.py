"""Saving trained models: whole checkpoints in the layout of the one they come from, with a model card."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from longvlm.pipeline.model_folder import SAFETENSORS, open_to_others, save_tensors
from longvlm.pipeline.models.families import is_llava
from longvlm.pipeline.models.llava.checkpoint import find_llava
from longvlm.pipeline.models.longvlm.checkpoint import OPTION_TEMPERATURE, Checkpoint, find_checkpoint
from longvlm.pipeline.models.longvlm.model import EMBED, PROJECT, PROJECT_BIAS, assemble
from longvlm.pipeline.training.card import CARD, ModelCard
from longvlm.pipeline.training.parameters import TrainedWeights

_COPIED = (  # what belongs to a checkpoint besides its weights and config.json
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


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
    if is_llava(model):
        _save_llava(weights, model, folder)
    else:
        _save_longvlm(weights, find_checkpoint(model), card.recipe.template, folder)
    (folder / CARD).write_text(card.as_markdown())


def _save_longvlm(weights: TrainedWeights, checkpoint: Checkpoint, template: str | None, folder: Path) -> None:
    tensors, tokenizer = assemble(checkpoint)
    changed = {**weights.llm, PROJECT: weights.projector["weight"], PROJECT_BIAS: weights.projector["bias"]}
    merged = {name: changed.get(name, tensor).to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
    save_tensors(merged, folder / SAFETENSORS)
    _copy(checkpoint.folder, folder, _COPIED)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**checkpoint.config, "vocab_size": len(merged[EMBED]), "mm_hidden_size": merged[PROJECT].shape[1]}
    config.pop(OPTION_TEMPERATURE, None)
    if template:
        config["mm_prompt_template"] = template  # what it was trained with is what it is asked with
    tower = Path(checkpoint.tower)
    if tower.is_dir() and not Path(checkpoint.config["mm_vision_tower"]).is_absolute():
        # it lies beside the model, so it goes along
        (folder / "tower").mkdir(exist_ok=True)
        _copy(tower, folder / "tower", (path.relative_to(tower) for path in tower.rglob("*")))
        config["mm_vision_tower"] = "tower"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _save_llava(weights: TrainedWeights, model: str, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    source = find_llava(model).folder
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    targets: dict[str, Tensor] = whole.state_dict()
    changed = {f"model.multi_modal_projector.{name}": tensor for name, tensor in weights.projector.items()}
    for name, tensor in weights.llm.items():
        changed[
            "lm_head.weight" if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}"
        ] = tensor
    with torch.no_grad():
        for name, tensor in changed.items():
            targets[name].copy_(tensor)
    whole.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        open_to_others(path)
    _copy(source, folder, _COPIED)


def _copy(source: Path, folder: Path, names: Iterable[str | Path]) -> None:
    """Copy those of some files that there are, and not their modes: caches may be for one user alone."""
    for name in names:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
