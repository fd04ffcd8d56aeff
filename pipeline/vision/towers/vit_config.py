"""What the config of a CLIP or SigLIP says of its vision transformer, read from JSON as transformers would."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longvlm.pipeline.model_folder import read_json
from longvlm.schemas.errors import InputError

CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"  # model types of towers alone
_WHOLE_MODELS = {"clip": CLIP, "siglip": SIGLIP}  # tower and text encoder together
# What a config leaves out has the value that transformers gives it.
_DEFAULTS: dict[str, dict[str, Any]] = {
    CLIP: {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    SIGLIP: {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
PROJECTION = "visual_projection.weight"  # of CLS tokens into the search space, beside the tower in a whole CLIP
ACTIVATIONS = ("quick_gelu", "silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class VitConfig:
    """The shape of a vision transformer, under transformers' names."""

    model_type: str
    patch_size: int  # pixels of a patch's side
    hidden_act: str
    layer_norm_eps: float
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels of a frame's side

    @property
    def has_cls(self) -> bool:
        """Whether a token for the whole picture stands before its patches."""
        return self.model_type == CLIP

    @property
    def grid_side(self) -> int:
        """Patches in a row, and rows of them."""
        return self.image_size // self.patch_size


def stands_alone(folder: Path) -> bool:
    """Whether a folder holds a tower and nothing else, so that its tensors have the names that they have inside it."""
    return read_json(folder, "config.json").get("model_type") in _DEFAULTS


def read_vit_config(folder: Path) -> VitConfig:
    """The vision transformer of a model folder: a tower alone, a whole CLIP or SigLIP, or a model around one.

    Raises:
        InputError: it holds none, or one whose config says what no such tower has.
    """
    raw = read_json(folder, "config.json")
    whole = raw.get("model_type", "")
    vision = raw if whole in _DEFAULTS else raw.get("vision_config") or {}
    kind = vision.get("model_type") or _WHOLE_MODELS.get(whole)
    if kind not in _DEFAULTS:
        raise InputError(
            f"{folder} holds a model of type {kind or whole or 'unknown'}, which has no vision tower known here; use "
            "a Qwen3-VL, a SmolVLM2, or a CLIP or SigLIP tower, such as openai/clip-vit-large-patch14 or "
            "google/siglip-base-patch16-224."
        )
    said = {field.name: vision[field.name] for field in fields(VitConfig) if field.name in vision}
    config = VitConfig(**{**_DEFAULTS[kind], **said, "model_type": kind})
    _check(folder, config)
    return config


def _check(folder: Path, config: VitConfig) -> None:
    sizes = {field.name: getattr(config, field.name) for field in fields(config) if field.type is int}
    if wrong := [name for name, size in sizes.items() if type(size) is not int or size < 1]:
        raise InputError(
            f"config.json of {folder} gives its vision tower the {wrong[0]} {sizes[wrong[0]]!r}, which must be a "
            "positive whole number; correct it."
        )
    if config.hidden_size % config.num_attention_heads or config.image_size < config.patch_size:
        raise InputError(
            f"config.json of {folder} describes no vision tower: {config.hidden_size} channels in "
            f"{config.num_attention_heads} heads, {config.image_size} pixels in patches of {config.patch_size}; "
            "correct it."
        )
    if config.hidden_act not in ACTIVATIONS or type(config.layer_norm_eps) is not float:
        raise InputError(
            f"config.json of {folder} gives its vision tower the hidden_act {config.hidden_act!r} and the "
            f"layer_norm_eps {config.layer_norm_eps!r}; it takes one of {', '.join(ACTIVATIONS)}, and a number."
        )
