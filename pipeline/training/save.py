"""Saving trained models: whole checkpoints in the layout of the one they come from, with a model card."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

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


def save_model(weights: TrainedWeights, card: ModelCard, folder: Path) -> None:
    """Write a whole checkpoint that `answer` loads: the trained tensors among those of the model that was trained.

    Tensors keep the type that they had on disk.

    Args:
        weights: from `TrainableModel.trained_weights`.
        card: its `model` is read once more from where it lies.
        folder: where to; files of the same names are replaced.

    Raises:
        InputError: the model is gone or broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_llava(card.model):
        _save_llava(weights, card.model, folder)
    else:
        _save_longvlm(weights, find_checkpoint(card.model), card.recipe.template, folder)
    (folder / CARD).write_text(card.as_markdown())


def _save_longvlm(weights: TrainedWeights, checkpoint: Checkpoint, template: str | None, folder: Path) -> None:
    tensors, tokenizer = assemble(checkpoint)
    changed = {**weights.llm, PROJECT: weights.projector["weight"], PROJECT_BIAS: weights.projector["bias"]}
    merged = {name: changed.get(name, tensor).to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
    _write(merged, folder)
    _copy(checkpoint.folder, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**checkpoint.config, "vocab_size": len(merged[EMBED]), "mm_hidden_size": merged[PROJECT].shape[1]}
    config.pop(OPTION_TEMPERATURE, None)
    if template:
        config["mm_prompt_template"] = template  # what it was trained with is what it is asked with
    tower = Path(checkpoint.tower)
    if tower.is_dir() and not Path(checkpoint.config["mm_vision_tower"]).is_absolute():
        shutil.copytree(tower, folder / "tower", dirs_exist_ok=True)  # it lies beside the model, so it goes along
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
    _copy(source, folder)


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    """In place of whatever is there, at once: somebody may be reading the last one."""
    draft = folder / ".model.safetensors"
    save_file(tensors, draft, metadata={"format": "pt"})
    draft.replace(folder / "model.safetensors")


def _copy(source: Path, folder: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
