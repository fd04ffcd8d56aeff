"""What saving a trained model shares between families."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longvlm.pipeline.model_folder import open_to_others
from longvlm.pipeline.models.checkpoints import load_with_tower

if TYPE_CHECKING:
    from torch import Tensor

COPIED = (  # what belongs to a checkpoint besides its weights and config.json
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


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """The weights that training has changed, float32 on the CPU, by their names in the two modules."""

    llm: dict[str, Tensor]
    projector: dict[str, Tensor]


class WholeCheckpoint(Protocol):
    """A checkpoint that transformers knows with its tower."""

    @property
    def name(self) -> str:
        """As the user named it."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    @property
    def config(self) -> Any:
        """Transformers' own."""


def save_whole(source: WholeCheckpoint, changed: dict[str, Tensor], folder: Path) -> None:
    """Write a checkpoint of transformers anew, its tower too, with some tensors changed, by their names in it."""
    import torch

    whole = load_with_tower(source.name, source.folder, source.config, "auto")
    targets: dict[str, Tensor] = whole.state_dict()
    with torch.no_grad():
        for name, tensor in changed.items():
            targets[name].copy_(tensor)
    whole.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        open_to_others(path)
    copy_files(source.folder, folder, COPIED)


def renamed(weights: TrainedWeights, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The language model's tensors by other names; a head keeps its own."""
    return {name if name == "lm_head.weight" else rename(name): tensor for name, tensor in weights.llm.items()}


def copy_files(source: Path, folder: Path, names: Iterable[str | Path]) -> None:
    """Copy those of some files that there are, and not their modes: caches may be for one user alone."""
    for name in names:
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
