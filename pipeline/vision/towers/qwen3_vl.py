"""Qwen3-VL's vision tower: pairs of frames to visual tokens, as its language model reads them.

A token is what the merger makes of 2 x 2 patches, and beside it, stream by stream, what the deepstack mergers make of
the same patches after earlier blocks. The first stream is what text layers read, so it decides merging; the others
are added to it on the way (`models/qwen3_vl`). Attention stays within a pair of frames: each is looked at by itself.
Frames keep their aspect in a grid that the recipe fixes: the processor's own resize follows from how many frames the
*whole* video has, and so would a segment's tokens.

Shape letters: F frames, B pictures (pairs of frames), N patches of a picture, P tokens of a picture, D channels of a
patch, H heads, d channels of a head.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import Qwen3VLConfig

from longvlm.pipeline.model_folder import read_json, resolve
from longvlm.pipeline.transfer import to_device
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.contract import Encoded
from longvlm.pipeline.weights import put_weights, read_tensors, weights_fingerprint
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec

# Tokens of a pair of frames, rows and columns: 320 x 512 pixels. Their shape lies between 16:9 and 4:3, so that either
# loses a tenth and a sixth of it to black bars.
DEFAULT_GRID = (10, 16)
# A picture has some 640 patches, more than twice as many as a frame of ViT-L/14.
PICTURES_PER_FORWARD = {"cpu": 4, "cuda": 32}
_PREFIX = re.compile(r"^(?:model\.)?visual\.")
_ROPE_THETA = 10_000.0  # of towers whose config names none


class Qwen3Tower:
    """A loaded tower of a Qwen3-VL. Make one with `load`."""

    def __init__(self, model: Any, config: Any, spec: TowerSpec, normalisation: Normalisation) -> None:
        self.spec = spec
        weight = model.patch_embed.proj.weight
        self.dtype: torch.dtype = weight.dtype
        self.device: torch.device = weight.device
        self._model, self._config, self._normalisation = model, config, normalisation
        self._layout = functools.lru_cache(maxsize=4)(self._lay_out)  # a run has one size of frames

    @torch.inference_mode()
    def encode(self, frames: Tensor, feature_layer: int = -2, num_global_layers: int = 5) -> Encoded:  # noqa: ARG002
        """See `Tower.encode`. It has one output and no CLS; sides are multiples of what a token stands for."""
        per_picture, (_, height, width, _) = self.spec.frames_per_picture, frames.shape
        cell_px = self._config.patch_size * self._config.spatial_merge_size
        if height % cell_px or width % cell_px or len(frames) % per_picture:
            raise ValueError(
                f"{len(frames)} frames of {height} x {width} pixels are no pictures of {per_picture}, their sides "
                f"multiples of {cell_px}"
            )
        num_pictures, num_tokens = len(frames) // per_picture, (height // cell_px) * (width // cell_px)
        patches_BPD = torch.empty(num_pictures, num_tokens, self.spec.dim, dtype=self.dtype, device=self.device)
        at_once = PICTURES_PER_FORWARD[self.device.type]
        for start in range(0, num_pictures, at_once):
            some = frames[start * per_picture : (start + at_once) * per_picture]
            pixels = self._normalisation.apply(some, self.device, self.dtype)
            self._forward(pixels, patches_BPD[start : start + at_once])
        return Encoded(patches_BPD)

    def _forward(self, pixels: Tensor, into_BPD: Tensor) -> None:
        """Fill in the tokens of some pictures, each stream in its place."""
        model, width = self._model, self._config.out_hidden_size
        embed_D, turn = self._layout(*pixels.shape[2:])
        projection = model.patch_embed.proj
        hidden_BND = linear(patchify(pixels, self._config), projection.weight.flatten(1), projection.bias) + embed_D
        stream = 1
        for number, block in enumerate(model.blocks):
            hidden_BND = _block(block, hidden_BND, turn)
            if number in self._config.deepstack_visual_indexes:
                merger = model.deepstack_merger_list[self._config.deepstack_visual_indexes.index(number)]
                self._merge(merger, hidden_BND, into_BPD[..., stream * width : (stream + 1) * width])
                stream += 1
        self._merge(model.merger, hidden_BND, into_BPD[..., :width])

    def _merge(self, merger: Any, hidden_BND: Tensor, into_BPD: Tensor) -> None:
        into_BPD.copy_(merger(hidden_BND.flatten(0, 1)).view(into_BPD.shape))

    def _lay_out(self, height: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """For frames of a size: the patches' learnt positions [N, D], and cosines and sines [N, 1, d] of their RoPE."""
        side, merge = self._config.patch_size, self._config.spatial_merge_size
        rows, columns = height // side, width // side
        # where each patch lies, in the order of `patchify`
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        places_2N = places.view(2, rows // merge, merge, columns // merge, merge).transpose(2, 3).reshape(2, -1)
        return self._learnt_positions(places_2N, rows, columns), self._turns(places_2N)

    def _learnt_positions(self, places_2N: Tensor, rows: int, columns: int) -> Tensor:
        """The learnt square grid of positions, stretched over the patches' and read between its points, bilinearly."""
        weight = self._model.pos_embed.weight
        last = round(len(weight) ** 0.5) - 1
        spacing = torch.tensor([last / max(rows - 1, 1), last / max(columns - 1, 1)])
        at_2N = places_2N.float() * spacing[:, None]
        low_2N = at_2N.floor().long().clamp(max=last)
        high_2N, share_2N = (low_2N + 1).clamp(max=last), at_2N - low_2N
        embed_ND = torch.zeros((), device=self.device)
        for row, row_share in ((low_2N[0], 1 - share_2N[0]), (high_2N[0], share_2N[0])):
            for column, column_share in ((low_2N[1], 1 - share_2N[1]), (high_2N[1], share_2N[1])):
                corner_ND = weight[to_device(row * (last + 1) + column, self.device)].float()
                embed_ND = embed_ND + corner_ND * to_device(row_share * column_share, self.device)[:, None]
        return embed_ND.to(self.dtype)

    def _turns(self, places_2N: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE of rows in the first half of the frequencies, of columns in the second , as transformers."""
        width = self._config.hidden_size // self._config.num_heads // 2
        theta = (getattr(self._config, "rope_parameters", None) or {}).get("rope_theta", _ROPE_THETA)
        frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        angles = (places_2N[..., None].float() * frequencies).transpose(0, 1).flatten(1)
        angles = torch.cat([angles, angles], dim=1)[:, None]
        return to_device(angles.cos(), self.device), to_device(angles.sin(), self.device)


def patchify(pixels: Tensor, config: Any) -> Tensor:
    """Frames [F, 3, height, width] as patches [B, N, values of a patch]: those of one token side by side."""
    per_picture, side, merge = config.temporal_patch_size, config.patch_size, config.spatial_merge_size
    num_frames, channels, height, width = pixels.shape
    rows, columns = height // (side * merge), width // (side * merge)
    parts = pixels.reshape(num_frames // per_picture, per_picture, channels, rows, merge, side, columns, merge, side)
    # B T C rows m p columns m p -> B rows columns m m C T p p
    return parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(parts), rows * columns * merge**2, -1)


def _block(block: Any, hidden_BND: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """A pre-norm transformer block over the patches of each picture."""
    attention = block.attn
    heads = (*hidden_BND.shape[:2], 3, attention.num_heads, -1)
    query, key, value = attention.qkv(block.norm1(hidden_BND)).view(heads).unbind(2)
    turned = (_turned(part, turn) for part in (query, key))
    mixed = scaled_dot_product_attention(*(part.transpose(1, 2) for part in (*turned, value)))
    hidden_BND = attention.proj(mixed.transpose(1, 2).flatten(2)).add_(hidden_BND)
    return block.mlp(block.norm2(hidden_BND)).add_(hidden_BND)


def _turned(heads_BNHd: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, in float32 as transformers does it."""
    cos, sin = turn
    wide = heads_BNHd.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(heads_BNHd.dtype)


def describe(model: str) -> TowerSpec:
    """See `families.describe_tower`."""
    folder = resolve(model)
    config = _vision_config(model, folder)
    Normalisation.from_folder(folder)
    return spec_of(model, weights_fingerprint(_tensors(folder)), config)


def load(model: str, precision: Precision, device: torch.device) -> Qwen3Tower:
    """See `families.load_tower`."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel  # takes seconds to load

    folder = resolve(model)
    config, normalisation = _vision_config(model, folder), Normalisation.from_folder(folder)
    tensors = dict(_tensors(folder))
    spec = spec_of(model, weights_fingerprint(tensors.items()), config)
    with torch.device("meta"):
        tower: nn.Module = Qwen3VLVisionModel(config)
    put_weights(tower, {name: tensor.to(device, getattr(torch, precision)) for name, tensor in tensors.items()}, model)
    return Qwen3Tower(tower, config, spec, normalisation)


def _vision_config(model: str, folder: Path) -> Any:
    try:
        return Qwen3VLConfig(**read_json(folder, "config.json")).vision_config
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).replace("\n", " ").strip().rstrip(".")
        raise InputError(f"config.json of {model} describes no Qwen3-VL ({reason}); correct it.") from error


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors, under their names inside the tower."""
    return read_tensors(folder, lambda name: name[found.end() :] if (found := _PREFIX.match(name)) else None)


def spec_of(model: str, weights: str, config: Any) -> TowerSpec:
    """What recipes know of a tower with a vision config, whose weights have a fingerprint."""
    num_streams, cell_px = 1 + len(config.deepstack_visual_indexes), config.patch_size * config.spatial_merge_size
    rows, columns = DEFAULT_GRID
    return TowerSpec(
        name=model,
        weights=weights,
        num_layers=0,
        patch_grid=DEFAULT_GRID,
        dim=num_streams * config.out_hidden_size,
        image_size=(rows * cell_px, columns * cell_px),
        has_cls=False,
        search_dim=None,
        frames_per_picture=config.temporal_patch_size,
        num_streams=num_streams,
        aspect="letterbox",
        has_positions=True,
    )
