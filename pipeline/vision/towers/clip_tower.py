"""A loaded CLIP or SigLIP tower: frames to patch tokens, global tokens and search embeddings.

Keeps only what LongVLM needs of a tower (LONGVLM.md, section 3): one hidden state's patches and the CLS rows of the
last few. The blocks are run here, one by one, so that no other hidden state outlives the next block.

Shape letters: F frames, N tokens of a frame (CLS first, where there is one), P patches, D channels, G global layers,
E search channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from longvlm.pipeline.vision.pixels import Pixels
from longvlm.pipeline.vision.towers.contract import Encoded
from longvlm.pipeline.vision.towers.vit import VisionTransformer, transformer_block
from longvlm.pipeline.vision.towers.vit_config import PROJECTION, VitConfig
from longvlm.pipeline.weights import put_weights
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

# A CPU gains nothing from more frames once its matrix products fill the caches' blocks, and 8 frames of ViT-L/14 keep
# the widest activation under 34 MB in float32. A GPU needs some 100 for its products to fill it; 128 take 1 GB.
FRAMES_PER_FORWARD = {"cpu": 8, "cuda": 128}


class ClipTower:
    """A loaded CLIP or SigLIP tower. Make one with `clip_siglip.load`."""

    def __init__(self, model: VisionTransformer, spec: TowerSpec, pixels: Pixels, projection: Tensor | None) -> None:
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


def _concatenated(parts: list[Tensor | None]) -> Tensor | None:
    return None if not parts or parts[0] is None else torch.cat(parts)  # type: ignore[arg-type] # all or none


def build_tower(
    spec: TowerSpec, config: VitConfig, tensors: dict[str, Tensor], pixels: Pixels, precision: Precision, device: Any
) -> ClipTower:
    """A tower around the tensors of a checkpoint, under the names that they have inside it.

    Raises:
        InputError: tensors are missing or of other shapes than the configuration says.
    """
    if config.hidden_act == "quick_gelu":
        tensors = _as_silu(tensors)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # its default, which would round a float32 tower's pixels to ten bits
    tensors = {name: tensor.to(device, getattr(torch, precision)) for name, tensor in tensors.items()}
    projection = tensors.pop(PROJECTION, None)
    model = VisionTransformer(config, has_head=spec.search_dim is not None and projection is None)
    put_weights(model, tensors, spec.name)
    return ClipTower(model, spec, pixels, projection)


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
