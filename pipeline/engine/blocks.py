"""The decoder blocks of LLaMA and its like (Mistral, Qwen2, Qwen3), run one by one in as few kernels as is simple.

Queries, keys and values are one product here, and gate and up another: fewer kernels to start, and a CPU reads one
large matrix faster than small ones. Attention is a step's own (`attention.py`).

Shape letters: T tokens of a pass, D model width, H query heads, K key heads, d channels of a head.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from longvlm.pipeline.engine.linear import Linear


class Attention(Protocol):
    """What one forward pass does about attention."""

    def attend(self, layer: int, query_THd: Tensor, kv_T2Kd: Tensor, scaling: float) -> Tensor:
        """What the queries of this pass see, [T, H, d], given its keys and values."""


class Blocks:
    """The decoder of a language model of transformers, which stays as it is and shares its weights.

    Raises:
        ValueError: its blocks are not those of a LLaMA.
    """

    def __init__(self, llm: Any) -> None:
        decoder = llm.get_decoder()
        self.blocks = [_Block(layer) for layer in decoder.layers]
        self._norm, self._rotary = decoder.norm, decoder.rotary_emb

    @property
    def has_fixed_rotary(self) -> bool:
        """Whether RoPE's frequencies stay what they are, however far the positions go."""
        kind = getattr(self._rotary, "rope_type", "default")
        return isinstance(kind, str) and "dynamic" not in kind and kind != "longrope"

    def run(
        self, embeds_TD: Tensor, positions: Tensor, attention: Attention, added_LTD: Tensor | None = None
    ) -> Tensor:
        """The last block's normed output, [T, D], for tokens that stand at some positions of their prompts.

        Args:
            embeds_TD: of the tokens.
            positions: [T], or [3, T] of time, row and column, where the model's RoPE knows such.
            attention: of this pass.
            added_LTD: what is added to the hidden states after each of the first L blocks.
        """
        cos_1Td, sin_1Td = self._rotary(embeds_TD, positions.unsqueeze(-2))
        half = sin_1Td.shape[-1] // 2
        # RoPE adds each half, turned, to the other: with the sign in the sine, turning is swapping
        sin_1Td = torch.cat([-sin_1Td[..., :half], sin_1Td[..., half:]], dim=-1)
        turn = cos_1Td[0, :, None], sin_1Td[0, :, None]
        hidden_TD = embeds_TD
        for layer, block in enumerate(self.blocks):
            hidden_TD = block.run(hidden_TD, turn, layer, attention)
            if added_LTD is not None and layer < len(added_LTD):
                hidden_TD += added_LTD[layer]
        return rms_norm(hidden_TD, hidden_TD.shape[-1:], self._norm.weight, self._norm.variance_epsilon)


class _Block:
    """Attention and a gated MLP, each behind a norm and beside a shortcut."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        known = {"q_proj", "k_proj", "v_proj", "o_proj"}
        head_norms = {"q_norm", "k_norm"}  # of queries and keys, head by head: Qwen3's blocks have them
        if unknown := {name for name, _ in attention.named_children()} - head_norms ^ known:
            raise ValueError(f"the attention of these blocks is not a LLaMA's: {', '.join(sorted(unknown))}")
        into = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.into, self.out = Linear(into), Linear([attention.o_proj])
        self.gate_up, self.down = Linear([mlp.gate_proj, mlp.up_proj]), Linear([mlp.down_proj])
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_queries, self.num_keys, _ = (layer.out_features // self.head_dim for layer in into)
        self.act = mlp.act_fn
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in norms]
        self.head_norm = None
        if hasattr(attention, "q_norm"):
            counts = ((attention.q_norm, self.num_queries), (attention.k_norm, self.num_keys))
            scale_Hd = torch.cat([norm.weight.expand(count, -1) for norm, count in counts])
            self.head_norm = scale_Hd, attention.q_norm.variance_epsilon

    def run(self, hidden_TD: Tensor, turn: tuple[Tensor, Tensor], layer: int, attention: Attention) -> Tensor:
        """[T, D] to [T, D]."""
        width = hidden_TD.shape[-1:]
        (norm, epsilon), (cos, sin) = self.norms[0], turn
        heads_THd = self.into(rms_norm(hidden_TD, width, norm, epsilon)).view(len(hidden_TD), -1, self.head_dim)
        turned = heads_THd[:, : self.num_queries + self.num_keys]
        if self.head_norm is not None:
            scale_Hd, head_epsilon = self.head_norm
            turned.copy_(rms_norm(turned, turned.shape[-1:], eps=head_epsilon).mul_(scale_Hd))
        swapped = turned.roll(self.head_dim // 2, dims=-1)
        turned.mul_(cos).addcmul_(swapped, sin)
        query_THd, kv = heads_THd[:, : self.num_queries], heads_THd[:, self.num_queries :]
        kv_T2Kd = kv.view(len(kv), 2, self.num_keys, self.head_dim)
        mixed_THd = attention.attend(layer, query_THd, kv_T2Kd, self.scaling)
        hidden_TD = self.out(mixed_THd.flatten(1)).add_(hidden_TD)
        norm, epsilon = self.norms[1]
        gate, up = self.gate_up(rms_norm(hidden_TD, width, norm, epsilon)).chunk(2, dim=-1)
        return self.down(self.act(gate).mul_(up)).add_(hidden_TD)
