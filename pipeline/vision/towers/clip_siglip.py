"""CLIP and SigLIP vision towers of transformers' checkpoints, alone or inside another model.

Describing one loads no torch, whose import takes seconds: what plans a run need not have it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.stored_tensors import StoredTensor, stored_fingerprint, stored_tensors
from longvlm.pipeline.vision.pixels import Pixels
from longvlm.pipeline.vision.towers.vit_config import PROJECTION, VitConfig, read_vit_config, stands_alone
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

if TYPE_CHECKING:
    import torch

    from longvlm.pipeline.vision.towers.clip_tower import ClipTower

_SEARCH_ONLY = re.compile(rf"^(?:head\.|{re.escape(PROJECTION)}$)")
_VISION_PREFIX = re.compile(r"^(?:.*\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?")


def describe(model: str) -> TowerSpec:
    """Describe a tower for a recipe, without building it: shapes, and a fingerprint of its weights.

    The fingerprint covers the vision tensors that tokens come from, under the names they have inside the tower, so that
    a tower saved with its text encoder, without it (and without SigLIP's pooling head, which only search embeddings
    need), or inside a larger model is the same tower.

    Raises:
        InputError: what the folder lacks, or that it holds no CLIP or SigLIP tower.
    """
    folder = resolve(model)
    config = read_vit_config(folder)
    Pixels.from_folder(folder, config.image_size)
    return _spec(model, folder, config, dict(stored_tensors(folder, _inner_names(folder))))


def load(model: str, precision: Precision, device: "torch.device") -> "ClipTower":
    """Load a tower for encoding.

    Raises:
        InputError: as `describe`, and where weights are missing or do not fit the configuration.
    """
    from longvlm.pipeline.vision.towers.clip_tower import build_tower
    from longvlm.pipeline.weights import read_tensors

    spec, folder = describe(model), resolve(model)
    config, tensors = read_vit_config(folder), dict(read_tensors(folder, _inner_names(folder)))
    return build_tower(spec, config, tensors, Pixels.from_folder(folder, config.image_size), precision, device)


def _inner_names(folder: Path) -> Callable[[str], str | None]:
    """What `rename` is to readers of tensors: the tower's own and the projection into the search space, if any.

    They get the names that they have inside the tower.
    """
    alone = stands_alone(folder)

    def rename(name: str) -> str | None:
        prefix = _VISION_PREFIX.match(name)
        inner = name[prefix.end() :] if prefix else name
        if inner == "embeddings.position_ids" or not (prefix or alone or name == PROJECTION):
            return None  # positions are counted, not learnt: old files carry them, new ones do not
        return inner

    return rename


def _spec(model: str, folder: Path, config: VitConfig, tensors: dict[str, StoredTensor]) -> TowerSpec:
    search_dim = None
    if PROJECTION in tensors:
        search_dim = tensors[PROJECTION].shape[0]
    elif read_json(folder, "config.json").get("model_type") == "siglip" and "head.probe" in tensors:
        search_dim = config.hidden_size
    return TowerSpec(
        name=model,
        weights=stored_fingerprint((name, tensor) for name, tensor in tensors.items() if not _SEARCH_ONLY.match(name)),
        num_layers=config.num_hidden_layers,
        patch_grid=(config.grid_side, config.grid_side),
        dim=config.hidden_size,
        image_size=config.image_size,
        has_cls=config.has_cls,
        search_dim=search_dim,
    )
