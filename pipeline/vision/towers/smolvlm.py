"""SmolVLM2's vision tower: frames to visual tokens, as its language model reads them.

A SigLIP encoder of square frames, its last hidden state normed, and a connector that puts the patches of a small square
side by side and projects them linearly, without bias. So a mean of its outputs is the output of a mean, and merging
costs nothing beyond what it costs before the connector.

Shape letters: F frames, N patches of a frame, P tokens of a frame, C channels of a patch.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import SmolVLMConfig

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.contract import Encoded
from longvlm.pipeline.vision.towers.vit import transformer_block
from longvlm.pipeline.weights import put_weights, read_tensors, weights_fingerprint
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

FRAMES_PER_FORWARD = {"cpu": 4, "cuda": 64}  # of 512 x 512 pixels, four times as many patches as ViT-L/14 has
_PREFIX = re.compile(r"^(?:model\.)?(?=vision_model\.|connector\.)")


class SmolTower:
    """A loaded tower of a SmolVLM2, with its connector. Make one with `load`."""

    def __init__(self, model: Any, config: Any, spec: TowerSpec, normalisation: Normalisation) -> None:
        self.spec = spec
        weight = model["vision_model"].post_layernorm.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self._vision, self._connector = model["vision_model"], model["connector"]
        self._scale, self._normalisation = config.scale_factor, normalisation

    @torch.inference_mode()
    def encode(self, frames: Tensor, feature_layer: int = -2, num_global_layers: int = 5) -> Encoded:  # noqa: ARG002
        """See `Tower.encode`. It has one output and no CLS, and takes frames of one size."""
        size = self.spec.frame_size
        if tuple(frames.shape[1:3]) != size:
            raise ValueError(f"frames of {frames.shape[1]} x {frames.shape[2]} pixels, and the tower takes {size[0]}")
        tokens_FPD = torch.empty(
            len(frames), self.spec.num_patches, self.spec.dim, dtype=self.dtype, device=self.device
        )
        at_once = FRAMES_PER_FORWARD[self.device.type]
        for start in range(0, len(frames), at_once):
            pixels = self._normalisation.apply(frames[start : start + at_once], self.device, self.dtype)
            tokens_FPD[start : start + at_once] = self._forward(pixels)
        return Encoded(tokens_FPD)

    def _forward(self, pixels: Tensor) -> Tensor:
        embeddings = self._vision.embeddings
        hidden_FNC = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden_FNC = hidden_FNC + embeddings.position_embedding.weight  # a square of the tower's own size
        for layer in self._vision.encoder.layers:
            hidden_FNC = transformer_block(layer, hidden_FNC)
        tokens_FPx = side_by_side(self._vision.post_layernorm(hidden_FNC), self._scale)
        projected: Tensor = self._connector.modality_projection(tokens_FPx)
        return projected


def side_by_side(hidden_FNC: Tensor, scale: int) -> Tensor:
    """The patches of each square of `scale` x `scale` as one row, [F, N / scale^2, C scale^2] (pixel shuffle)."""
    num_frames, num_patches, channels = hidden_FNC.shape
    side = round(num_patches**0.5) // scale
    squares = hidden_FNC.view(num_frames, side, scale, side, scale, channels)
    return squares.transpose(2, 3).reshape(num_frames, side**2, -1)


def describe(model: str) -> TowerSpec:
    """See `families.describe_tower`."""
    folder = resolve(model)
    config = _config(model, folder)
    Normalisation.from_folder(folder)
    return _spec(model, config, dict(_tensors(folder)))


def load(model: str, precision: Precision, device: torch.device) -> SmolTower:
    """See `families.load_tower`."""
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionTransformer

    folder = resolve(model)
    config, normalisation = _config(model, folder), Normalisation.from_folder(folder)
    tensors = dict(_tensors(folder))
    spec = _spec(model, config, tensors)
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {"vision_model": SmolVLMVisionTransformer(config.vision_config), "connector": SmolVLMConnector(config)}
        )
    put_weights(parts, {name: tensor.to(device, getattr(torch, precision)) for name, tensor in tensors.items()}, model)
    return SmolTower(parts, config, spec, normalisation)


def _config(model: str, folder: Path) -> Any:
    try:
        config = SmolVLMConfig(**read_json(folder, "config.json"))
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {model} describes no SmolVLM ({reason}); correct it.") from error
    vision = config.vision_config
    if not isinstance(vision.image_size, int) or (vision.image_size // vision.patch_size) % config.scale_factor:
        raise InputError(
            f"config.json of {model} asks for frames of {vision.image_size} pixels in patches of {vision.patch_size}, "
            f"and its connector takes squares of {config.scale_factor} x {config.scale_factor} patches; correct it."
        )
    return config


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of encoder and connector, under their names inside the model."""
    return read_tensors(folder, lambda name: name[found.end() :] if (found := _PREFIX.match(name)) else None)


def _spec(model: str, config: Any, tensors: dict[str, Tensor]) -> TowerSpec:
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    return TowerSpec(
        name=model,
        weights=weights_fingerprint(tensors.items()),
        num_layers=0,
        patch_grid=(side, side),
        dim=config.text_config.hidden_size,
        image_size=config.vision_config.image_size,
        has_cls=False,
        search_dim=None,
        has_positions=True,
    )
