"""The families of vision towers, told apart by their config alone.

A family's code is loaded where one of its towers is met: that of some takes seconds.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

if TYPE_CHECKING:
    import torch

    from longvlm.pipeline.vision.towers.contract import Tower


def describe_tower(model: str) -> TowerSpec:
    """Describe the tower of a model for a recipe, without building it: shapes, and a fingerprint of its weights.

    Raises:
        InputError: what the folder lacks, or that it holds no tower of a known family.
    """
    spec: TowerSpec = _family(model).describe(model)
    return spec


def load_tower(model: str, precision: Precision = "float32", device: "str | torch.device" = "cpu") -> "Tower":
    """Load a tower for encoding.

    Raises:
        InputError: as `describe_tower`, and where weights are missing or do not fit the configuration.
    """
    import torch

    tower: Tower = _family(model).load(model, precision, torch.device(device))
    return tower


def _family(model: str) -> ModuleType:
    match read_json(resolve(model), "config.json").get("model_type"):
        case "qwen3_vl":
            from longvlm.pipeline.vision.towers import qwen3_vl

            return qwen3_vl
        case "smolvlm":
            from longvlm.pipeline.vision.towers import smolvlm

            return smolvlm
        case _:
            from longvlm.pipeline.vision.towers import clip_siglip

            return clip_siglip
