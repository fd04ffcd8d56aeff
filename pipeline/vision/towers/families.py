"""The families of vision towers, told apart by their config alone."""

from types import ModuleType

import torch

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.vision.towers import clip_siglip, qwen3_vl, smolvlm
from longvlm.pipeline.vision.towers.contract import Tower
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

_FAMILIES = {qwen3_vl.MODEL_TYPE: qwen3_vl, smolvlm.MODEL_TYPE: smolvlm}  # by model type; all others: CLIP or SigLIP


def describe_tower(model: str) -> TowerSpec:
    """Describe the tower of a model for a recipe, without building it: shapes, and a fingerprint of its weights.

    Raises:
        InputError: what the folder lacks, or that it holds no tower of a known family.
    """
    spec: TowerSpec = _family(model).describe(model)
    return spec


def load_tower(model: str, precision: Precision = "float32", device: str | torch.device = "cpu") -> Tower:
    """Load a tower for encoding.

    Raises:
        InputError: as `describe_tower`, and where weights are missing or do not fit the configuration.
    """
    tower: Tower = _family(model).load(model, precision, torch.device(device))
    return tower


def _family(model: str) -> ModuleType:
    return _FAMILIES.get(str(read_json(resolve(model), "config.json").get("model_type")), clip_siglip)
