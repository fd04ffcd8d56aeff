"""CLIP and SigLIP vision towers of transformers: frames to patch tokens, global tokens and search embeddings.

Keeps only what LongVLM needs of a tower (LONGVLM.md, section 3): one hidden state's patches and the CLS rows of the
last few. The blocks are run here, one by one, so that no other hidden state outlives the next block.

Shape letters: F frames, N tokens of a frame (CLS first, where there is one), P patches, D channels, G global layers,
E search channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import CLIPVisionConfig, SiglipVisionConfig

from longvlm.pipeline.model_folder import (
    build_module,
    read_json,
    read_tensors,
    resolve,
    weights_fingerprint,
)
from longvlm.pipeline.vision.pixels import Pixels
from longvlm.pipeline.vision.towers.contract import Encoded
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

# A CPU gains nothing from more frames once its matrix products fill the caches' blocks, and 8 frames of ViT-L/14 keep
# the widest activation under 34 MB in float32. A GPU needs some 100 for its products to fill it; 128 take 1 GB.
FRAMES_PER_FORWARD = {"cpu": 8, "cuda": 128}

_TOWERS: dict[str, Any] = {"clip_vision_model": CLIPVisionConfig, "siglip_vision_model": SiglipVisionConfig}
_WHOLE_MODELS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # tower and text encoder together
_PROJECTION = "visual_projection.weight"
_SEARCH_ONLY = re.compile(rf"^(?:head\.|{re.escape(_PROJECTION)}$)")
_VISION_PREFIX = re.compile(r"^(?:.*\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?")


class ClipTower:
    """A loaded CLIP or SigLIP tower. Make one with `load`."""

    def __init__(self, model: Any, spec: TowerSpec, pixels: Pixels, projection: Tensor | None) -> None:
        self.spec = spec
        self.pixels = pixels
        weight = model.post_layernorm.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self._model = model
        self._projection_ED = projection

    @torch.inference_mode()
    def encode(self, frames: Tensor, feature_layer: int = -2, num_global_layers: int = 5) -> Encoded:
        """See `Tower.encode`. Frames of any square size; others than the tower's are resized as its processor does."""
        num_frames, num_global = frames.shape[0], num_global_layers if self.spec.has_cls else 0
        chunk = FRAMES_PER_FORWARD[self.device.type]
        shape_FPD = (num_frames, self.spec.num_patches, self.spec.dim)
        patches_FPD = torch.empty(shape_FPD, dtype=self.dtype, device=self.device)
        cls, embeddings = [], []
        for start in range(0, num_frames, chunk):
            pixels = self.pixels.prepare(frames[start : start + chunk], self.device, self.dtype)
            cls_FGD, embedding_FE = self._forward(
                pixels, feature_layer % (self.spec.num_layers + 1), num_global, patches_FPD[start : start + chunk]
            )
            cls.append(cls_FGD)
            embeddings.append(embedding_FE)
        return Encoded(patches_FPD, _concatenated(cls), _concatenated(embeddings))

    def _forward(
        self, pixels: Tensor, feature_state: int, num_global: int, patches_FPD: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """One chunk: fills in its patches; returns its CLS rows and its embedding."""
        num_layers, num_special = self.spec.num_layers, int(self.spec.has_cls)
        last_state = num_layers if num_global or self.spec.search_dim else feature_state
        hidden_FND = self._model.embeddings(pixels)
        if self.spec.has_cls:
            hidden_FND = self._model.pre_layrnorm(hidden_FND)
        cls = []
        for state in range(last_state + 1):
            if state:
                # the last block's patches serve nobody but SigLIP's pooling head, unless they are the features
                only_cls = state == num_layers > feature_state and self.spec.has_cls
                hidden_FND = transformer_block(
                    self._model.encoder.layers[state - 1], hidden_FND, 1 if only_cls else None
                )
            if state == feature_state:
                patches_FPD.copy_(hidden_FND[:, num_special:])
            if state > num_layers - num_global:
                cls.append(hidden_FND[:, 0])
        return torch.stack(cls, dim=1) if cls else None, self._embedding(hidden_FND)

    def _embedding(self, hidden_FND: Tensor) -> Tensor | None:
        """The image's place beside texts, from the last hidden state: CLIP projects the CLS row, SigLIP pools."""
        if self.spec.search_dim is None:
            return None
        if self._projection_ED is None:
            pooled_FE = self._model.head(self._model.post_layernorm(hidden_FND))
        else:
            pooled_FE = self._model.post_layernorm(hidden_FND[:, 0]) @ self._projection_ED.T
        return normalize(pooled_FE.float(), dim=-1)


def transformer_block(layer: Any, hidden_FND: Tensor, num_queries: int | None = None) -> Tensor:
    """A pre-norm transformer block for the first `num_queries` tokens of each frame, attending to all of them."""
    attention = layer.self_attn
    normed_FND = layer.layer_norm1(hidden_FND)
    heads_shape = (hidden_FND.shape[0], -1, attention.num_heads, attention.head_dim)
    query, key, value = (
        projection(tokens).view(heads_shape).transpose(1, 2)
        for projection, tokens in (
            (attention.q_proj, normed_FND[:, :num_queries]),
            (attention.k_proj, normed_FND),
            (attention.v_proj, normed_FND),
        )
    )
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden_FND = attention.out_proj(mixed).add_(hidden_FND[:, :num_queries])
    return layer.mlp(layer.layer_norm2(hidden_FND)).add_(hidden_FND)


def _concatenated(parts: list[Tensor | None]) -> Tensor | None:
    return None if not parts or parts[0] is None else torch.cat(parts)  # type: ignore[arg-type] # all or none


def describe(model: str) -> TowerSpec:
    """Describe a tower for a recipe, without building it: shapes, and a fingerprint of its weights.

    The fingerprint covers the vision tensors that tokens come from, under the names they have inside the tower, so that
    a tower saved with its text encoder, without it (and without SigLIP's pooling head, which only search embeddings
    need), or inside a larger model is the same tower.

    Raises:
        InputError: what the folder lacks, or that it holds no CLIP or SigLIP tower.
    """
    folder = resolve(model)
    config = _vision_config(folder)
    Pixels.from_folder(folder, config.image_size)
    return _spec(model, folder, config, _vision_tensors(folder))


def load(model: str, precision: Precision, device: torch.device) -> ClipTower:
    """Load a tower for encoding.

    Raises:
        InputError: as `describe`, and where weights are missing or do not fit the configuration.
    """
    folder = resolve(model)
    config = _vision_config(folder)
    pixels = Pixels.from_folder(folder, config.image_size)
    tensors = _vision_tensors(folder)
    spec = _spec(model, folder, config, tensors)
    if config.hidden_act == "quick_gelu":
        config.hidden_act, tensors = "silu", _as_silu(tensors)
    dtype = getattr(torch, precision)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # its default, which would round a float32 tower's pixels to ten bits
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    projection = tensors.pop(_PROJECTION, None)
    return ClipTower(build_module(_model_class(config), config, tensors, model), spec, pixels, projection)


def _model_class(config: Any) -> Any:
    """The class of a tower; its code takes seconds to load, and describing a tower does not need it."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    return CLIPVisionModel if config.model_type == "clip_vision_model" else SiglipVisionModel


def _as_silu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network with CLIP's activation written as SiLU: x * sigmoid(1.702 x) = silu(1.702 x) / 1.702.

    SiLU is one pass over the widest activations where transformers' form takes three; the factors go into the linear
    maps before and after, in float32, ahead of any rounding to the tower's precision.
    """
    factors = {"mlp.fc1.weight": 1.702, "mlp.fc1.bias": 1.702, "mlp.fc2.weight": 1 / 1.702}

    def scaled(name: str, tensor: Tensor) -> Tensor:
        factor = next((factor for ending, factor in factors.items() if name.endswith(ending)), None)
        return tensor if factor is None else tensor.float() * factor

    return {name: scaled(name, tensor) for name, tensor in tensors.items()}


def _vision_config(folder: Path) -> Any:
    raw = read_json(folder, "config.json")
    whole = raw.get("model_type", "")
    vision = raw if whole in _TOWERS else raw.get("vision_config") or {}
    kind = vision.get("model_type") or _WHOLE_MODELS.get(whole)
    if kind not in _TOWERS:
        raise InputError(
            f"{folder} holds a model of type {kind or whole or 'unknown'}, which has no vision tower known here; use "
            "a Qwen3-VL, a SmolVLM2, or a CLIP or SigLIP tower, such as openai/clip-vit-large-patch14 or "
            "google/siglip-base-patch16-224."
        )
    return _TOWERS[kind].from_dict(vision)


def _vision_tensors(folder: Path) -> dict[str, Tensor]:
    """The tower's tensors under their names inside the tower, and the projection into the search space if any."""
    alone = read_json(folder, "config.json").get("model_type") in _TOWERS

    def rename(name: str) -> str | None:
        prefix = _VISION_PREFIX.match(name)
        inner = name[prefix.end() :] if prefix else name
        if inner == "embeddings.position_ids" or not (prefix or alone or name == _PROJECTION):
            return None  # positions are counted, not learnt: old files carry them, new ones do not
        return inner

    return dict(read_tensors(folder, rename))


def _spec(model: str, folder: Path, config: Any, tensors: dict[str, Tensor]) -> TowerSpec:
    search_dim = None
    if _PROJECTION in tensors:
        search_dim = tensors[_PROJECTION].shape[0]
    elif read_json(folder, "config.json").get("model_type") == "siglip" and "head.probe" in tensors:
        search_dim = config.hidden_size
    rows = config.image_size // config.patch_size
    return TowerSpec(
        name=model,
        weights=weights_fingerprint((name, tensor) for name, tensor in tensors.items() if not _SEARCH_ONLY.match(name)),
        num_layers=config.num_hidden_layers,
        patch_grid=(rows, rows),
        dim=config.hidden_size,
        image_size=config.image_size,
        has_cls=config.model_type == "clip_vision_model",
        search_dim=search_dim,
    )
