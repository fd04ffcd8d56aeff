"""The vision transformer of CLIP and SigLIP: modules of torch under the names that their tensors have in checkpoints.

They give the numbers that transformers' own modules give, whose loading takes twice as long as torch's, and for which
each encoder that starts would wait.

Shape letters: F frames, N tokens of a frame (CLS first, where there is one), P patches, D channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from longvlm.pipeline.vision.towers.vit_config import VitConfig

_CHANNELS = 3  # red, green and blue


class VisionTransformer(nn.Module):
    """The layers of a tower, for `ClipTower` to run one by one.

    Args:
        config: of the tower.
        has_head: whether SigLIP's pooling head is among them.
    """

    def __init__(self, config: VitConfig, *, has_head: bool) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        if config.has_cls:
            self.pre_layrnorm = _norm(config)  # so it is spelt in every checkpoint
        self.encoder = _Layers(config)
        self.post_layernorm = _norm(config)
        if has_head:
            self.head = _PoolingHead(config)


class _Linear(nn.Linear):
    """A linear map whose weights a file has: none are drawn first.

    On torch's meta device none would be either, but it loads sympy and a compiler with its first tensor, for as many
    seconds as torch itself takes.
    """

    def reset_parameters(self) -> None:
        """Leave the memory as it is, which then is never touched."""


class _Embeddings(nn.Module):
    """Pixels [F, 3, height, width] to embeddings [F, N, D] with their positions."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        side, has_cls = config.patch_size, config.has_cls
        if has_cls:
            self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(_CHANNELS, config.hidden_size, side, side, bias=not has_cls)
        self.position_embedding = nn.Embedding(config.grid_side**2 + has_cls, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens_FND = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if hasattr(self, "class_embedding"):
            cls_F1D = self.class_embedding.expand(len(pixels), 1, -1)
            tokens_FND = torch.cat([cls_F1D, tokens_FND], dim=1)
        embeddings_FND: Tensor = tokens_FND + self.position_embedding.weight
        return embeddings_FND


class _VitAttention(nn.Module):
    """The projections of a block's attention; `transformer_block` multiplies them."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, _Linear(config.hidden_size, config.hidden_size))


class _VitMlp(nn.Module):
    """What follows attention in a block."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = _Linear(config.hidden_size, config.intermediate_size)
        self.act = _activation(config.hidden_act)
        self.fc2 = _Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_FND: Tensor) -> Tensor:
        mixed_FND: Tensor = self.fc2(self.act(self.fc1(hidden_FND)))
        return mixed_FND


class _VitBlock(nn.Module):
    """The parts of a pre-norm transformer block; `transformer_block` runs it."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = _norm(config), _norm(config)
        self.self_attn, self.mlp = _VitAttention(config), _VitMlp(config)


class _Layers(nn.Module):
    """The blocks of a tower."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_VitBlock(config) for _ in range(config.num_hidden_layers))


class _PoolingHead(nn.Module):
    """SigLIP's summary of a frame: what a learnt query finds among its patches [F, N, D], [F, D]."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm, self.mlp = _norm(config), _VitMlp(config)

    def forward(self, hidden_FND: Tensor) -> Tensor:
        probe_F1D = self.probe.expand(len(hidden_FND), -1, -1)
        found_F1D, _ = self.attention(probe_F1D, hidden_FND, hidden_FND)
        pooled_F1D: Tensor = found_F1D + self.mlp(self.layernorm(found_F1D))
        return pooled_F1D[:, 0]


def _norm(config: VitConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _activation(name: str) -> nn.Module:
    """By its name in configs; `quick_gelu` is written as SiLU by `clip_tower.build_tower`."""
    if name in ("silu", "quick_gelu"):
        return nn.SiLU()
    return nn.GELU(approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


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
