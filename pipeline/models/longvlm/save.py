"""Saving a trained LongVLM in the reference's layout, consolidated."""

import json
from pathlib import Path

from longvlm.pipeline.model_folder import SAFETENSORS
from longvlm.pipeline.models.checkpoints import EMBED
from longvlm.pipeline.models.longvlm.checkpoint import OPTION_TEMPERATURE, find_checkpoint
from longvlm.pipeline.models.longvlm.model import PROJECT, PROJECT_BIAS, assemble
from longvlm.pipeline.models.saving import COPIED, TrainedWeights, copy_files
from longvlm.pipeline.weights import save_tensors


def save_longvlm(model: str, weights: TrainedWeights, template: str | None, folder: Path) -> None:
    """See `families.save`."""
    checkpoint = find_checkpoint(model)
    tensors, tokenizer = assemble(checkpoint)
    changed = {**weights.llm, PROJECT: weights.projector["weight"], PROJECT_BIAS: weights.projector["bias"]}
    merged = {name: changed.get(name, tensor).to(tensor.dtype).contiguous() for name, tensor in tensors.items()}
    save_tensors(merged, folder / SAFETENSORS)
    copy_files(checkpoint.folder, folder, COPIED)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**checkpoint.config, "vocab_size": len(merged[EMBED]), "mm_hidden_size": merged[PROJECT].shape[1]}
    config.pop(OPTION_TEMPERATURE, None)
    if template:
        config["mm_prompt_template"] = template  # what it was trained with is what it is asked with
    tower = Path(checkpoint.tower)
    if tower.is_dir() and not Path(checkpoint.config["mm_vision_tower"]).is_absolute():
        # it lies beside the model, so it goes along
        (folder / "tower").mkdir(exist_ok=True)
        copy_files(tower, folder / "tower", (path.relative_to(tower) for path in tower.rglob("*")))
        config["mm_vision_tower"] = "tower"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
