"""Attention of many questions over few videos: each video's keys and values are kept once, whoever asks about it.

A forward pass is given the tokens of all its rows in one line, without padding, so that every matrix product but
attention's sees only real tokens. Attention then takes the line apart again: against the prefix of a video, all tokens
that ask about it are one matrix product; against what follows the prefix, each row is one of its own; one softmax goes
over both.

Shape letters: T tokens of the pass, V videos, R rows, P prefix positions, L tail positions, H query heads, K key heads,
G query heads of a key head (H / K), d channels of a head, W watched tokens, Q tokens of some questions.
"""

# ruff: noqa: N803, N806, N815 - tensors are named by their shape

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

ATTENTION = "shared_prefix"  # the name under which transformers' models call `_attend`
MAX_TOKENS_TOGETHER = 256  # of one video's questions in a call: the work for what the mask hides grows with the square


class Step(Protocol):
    """What one forward pass does about attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What the queries [1, H, T, d] of this pass see, [1, T, H, d], given its keys and values [1, K, T, d]."""


def _attend(  # noqa: PLR0913 - transformers' signature
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - a step knows better: transformers makes none for this name
    *,
    scaling: float,
    step: Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if step is None:
        raise ValueError("this model belongs to an engine and cannot run by itself; load it again")
    return step.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attend)


@dataclass(eq=False)
class KeysValues:
    """Keys and values of a number of sequences by layer, [sequences, K, positions, d] each; zeros beyond their ends."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def num_positions(self) -> int:
        """Room for tokens in each sequence."""
        return self.keys[0].shape[2] if self.keys else 0

    def select_and_append(self, kept: Sequence[int], more: "KeysValues", num_positions: int) -> None:
        """Keep some sequences, append others, and give all of them room: a layer at a time, to save memory."""
        for name in ("keys", "values"):
            mine, new = getattr(self, name), getattr(more, name)
            for layer in range(max(len(mine), len(new))):
                parts = [mine[layer][list(kept)]] if kept else []
                if new:
                    parts.append(new[layer])
                    new[layer] = None
                wide = [pad(part, (0, 0, 0, num_positions - part.shape[2])) for part in parts]
                joined = torch.cat(wide) if len(wide) > 1 else wide[0]
                mine[layer : layer + 1] = [joined]

    def write(self, layer: int, row_T: Tensor, position_T: Tensor, key: Tensor, value: Tensor) -> None:
        """Put the keys and values [1, K, T, d] of some tokens where they belong."""
        self.keys[layer][row_T, :, position_T] = key[0].transpose(0, 1)
        self.values[layer][row_T, :, position_T] = value[0].transpose(0, 1)

    def clear(self) -> None:
        """Forget everything."""
        self.keys.clear()
        self.values.clear()


class PrefixStep:
    """Prefill of some videos' prefixes, which do not see each other; their keys and values are kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.made = KeysValues()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention within each prefix."""
        if layer != len(self.made.keys):
            raise ValueError(f"layer {layer} came after {len(self.made.keys)} others")
        queries, keys, values = (torch.split(part, self.lengths, dim=2) for part in (query, key, value))
        mixed = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=_is_grouped(q, k))
            for q, k, v in zip(queries, keys, values, strict=True)
        ]
        for kept, parts in ((self.made.keys, keys), (self.made.values, values)):
            by_position = [part[0].transpose(0, 1) for part in parts]  # [P, K, d] each
            kept.append(pad_sequence(by_position, batch_first=True).transpose(1, 2).contiguous())
        return torch.cat(mixed, dim=2).transpose(1, 2)


@dataclass(eq=False)
class Watch:
    """Attention to the prefix in some layers, summed up as it happens."""

    layers: frozenset[int]
    seen_TP: Tensor | None = None  # mean over heads and layers, float32

    def look(self, layer: int, weights_TKGP: Tensor) -> None:
        """Add one layer's attention to the prefix."""
        if layer in self.layers:
            mean_TP = weights_TKGP.mean(dim=(1, 2), dtype=torch.float32) / len(self.layers)
            self.seen_TP = mean_TP if self.seen_TP is None else self.seen_TP.add_(mean_TP)


class _Grid:
    """Tokens sorted into bins of one size, so that one batched product serves each bin with its own matrix."""

    def __init__(self, bin_T: Sequence[int], num_bins: int, device: torch.device) -> None:
        fill = [0] * num_bins
        places = []
        for bin_ in bin_T:
            places.append((bin_, fill[bin_]))
            fill[bin_] += 1
        self.num_bins, self.width = num_bins, max(fill)
        self.place_T = torch.tensor([bin_ * self.width + place for bin_, place in places], device=device)
        token_of_place = torch.zeros(num_bins * self.width, dtype=torch.int64)
        token_of_place[self.place_T.cpu()] = torch.arange(len(bin_T))
        self.token_of_place = token_of_place.to(device)  # places without a token compute token 0 once more
        self.is_sorted = torch.equal(token_of_place, torch.arange(len(bin_T)))  # and no place is without a token

    def product(self, tokens_TKGx: Tensor, bins_Kxy: Tensor) -> Tensor:
        """Each token's [K, G, x] times its bin's [K, x, y]: [T, K, G, y]."""
        _, num_k, num_g, _ = tokens_TKGx.shape
        if self.is_sorted and self.width == 1:
            return tokens_TKGx @ bins_Kxy
        by_place = tokens_TKGx if self.is_sorted else tokens_TKGx[self.token_of_place]
        sorted_ = by_place.view(self.num_bins, self.width, num_k, num_g, -1).transpose(1, 2)
        made = sorted_.reshape(self.num_bins, num_k, self.width * num_g, -1) @ bins_Kxy
        made = made.view(self.num_bins, num_k, self.width, num_g, -1).transpose(1, 2)
        by_place = made.reshape(self.num_bins * self.width, num_k, num_g, -1)
        return by_place if self.is_sorted else by_place[self.place_T]


class BranchStep:
    """Tokens of rows that branch off prefixes: a token a row and step.

    Token t belongs to row `rows[t]`, whose tail it extends at `positions[t]`, counted from the end of the prefix.
    """

    def __init__(
        self, prefixes: KeysValues, prefix_lengths: Tensor, video_of_row: Sequence[int], rows: Sequence[int]
    ) -> None:
        device = prefix_lengths.device
        self.prefixes = prefixes
        videos = [video_of_row[row] for row in rows]
        self.by_video = _Grid(videos, len(prefix_lengths), device)
        self.by_row = _Grid(rows, len(video_of_row), device)
        self.row_T = torch.tensor(rows, device=device)
        self.length_T = prefix_lengths[torch.tensor(videos, device=device)]
        columns_P = torch.arange(prefixes.num_positions, device=device)
        self.in_prefix_TP = columns_P < self.length_T[:, None]

    def begin(self, tails: KeysValues, positions_T: Tensor, watch: Watch) -> Tensor:
        """Prepare a pass that writes to `tails` at some positions.

        Returns:
            position ids [1, T], counted from the beginning of the prompt.
        """
        self.tails, self.position_T, self.watch = tails, positions_T, watch
        columns_L = torch.arange(tails.num_positions, device=positions_T.device)
        visible_TX = torch.cat([self.in_prefix_TP, columns_L <= positions_T[:, None]], dim=1)
        self.hidden_TX = ~visible_TX[:, None, None]
        return (self.length_T + positions_T)[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each token over its video's prefix and its own row so far, itself included."""
        self.tails.write(layer, self.row_T, self.position_T, key, value)
        weights_TKGX = self.weights(layer, query[0].transpose(0, 1), scaling)
        num_p = self.prefixes.num_positions
        mixed_TKGd = self.by_video.product(weights_TKGX[..., :num_p], self.prefixes.values[layer])
        mixed_TKGd += self.by_row.product(weights_TKGX[..., num_p:], self.tails.values[layer])
        return mixed_TKGd.flatten(1, 2)[None]

    def weights(self, layer: int, query_THd: Tensor, scaling: float) -> Tensor:
        """How much each token attends to each position of its prefix, then of its tail: [T, K, G, P + L]."""
        num_t, num_h, width = query_THd.shape
        prefix_keys, tail_keys = self.prefixes.keys[layer], self.tails.keys[layer]
        num_k = tail_keys.shape[1]
        query_TKGd = (query_THd * scaling).view(num_t, num_k, num_h // num_k, width)
        # tails are taken with all the room they have: a slice would be copied by each product
        scores_TKGX = torch.cat(
            [self.by_video.product(query_TKGd, prefix_keys.mT), self.by_row.product(query_TKGd, tail_keys.mT)], dim=-1
        )
        scores_TKGX.masked_fill_(self.hidden_TX, float("-inf"))
        weights_TKGX = scores_TKGX.softmax(dim=-1, dtype=torch.float32).to(query_THd.dtype)
        self.watch.look(layer, weights_TKGX[..., : self.prefixes.num_positions])
        return weights_TKGX


class QuestionStep:
    """Prefill of the questions themselves, each seeing its video's prefix and its own tokens so far.

    Some questions of one video are one call of the fused kernel, whose mask hides them from each other: the scores of
    thousands of tokens are never laid out. Only those of watched tokens are, in the layers where they are watched.
    """

    def __init__(
        self, questions: Sequence["Question"], tails: KeysValues, watching: BranchStep, watched: Tensor
    ) -> None:
        device = watched.device
        lengths = [question.length for question in questions]
        self.row_T = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        self.position_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.tails, self.watching, self.watched_W = tails, watching, watched
        self.parts: list[tuple[int, int, slice, Tensor]] = []  # video, its prefix's length, tokens, what these may see
        end = 0
        for (video, length), alike in groupby(questions, key=lambda question: (question.video, question.prefix_length)):
            for some in chunked([question.length for question in alike], MAX_TOKENS_TOGETHER):
                start, end = end, end + sum(some)
                rows_Q = self.row_T[start:end]
                is_own_QQ = (rows_Q[:, None] == rows_Q).tril()
                visible = torch.cat([is_own_QQ.new_ones(len(rows_Q), length), is_own_QQ], dim=1)
                self.parts.append((video, length, slice(start, end), visible))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each token over its video's prefix and its own question so far."""
        self.tails.write(layer, self.row_T, self.position_T, key, value)
        prefixes = self.watching.prefixes
        mixed = []
        for video, length, tokens, visible in self.parts:
            keys, values = (
                torch.cat([kept[layer][video : video + 1, :, :length], new[:, :, tokens]], dim=2)
                for kept, new in ((prefixes.keys, key), (prefixes.values, value))
            )
            mixed.append(
                scaled_dot_product_attention(
                    query[:, :, tokens],
                    keys,
                    values,
                    attn_mask=visible,
                    scale=scaling,
                    enable_gqa=_is_grouped(query, keys),
                )
            )
        if layer in self.watching.watch.layers:
            self.watching.weights(layer, query[0].transpose(0, 1)[self.watched_W], scaling)
        return torch.cat(mixed, dim=2).transpose(1, 2)


@dataclass(frozen=True)
class Question:
    """Where a question goes: the number of its video, the length of that one's prefix, and its own."""

    video: int
    prefix_length: int
    length: int


def _is_grouped(query: Tensor, key: Tensor) -> bool:
    """Whether key heads serve several query heads: said only where it is so, since it rules fused kernels out."""
    return query.shape[1] != key.shape[1]


def chunked(sizes: Iterable[int], most: int) -> Iterator[list[int]]:
    """Consecutive sizes that add up to `most` at most, but one at least."""
    chunk: list[int] = []
    for size in sizes:
        if chunk and sum(chunk) + size > most:
            yield chunk
            chunk = []
        chunk.append(size)
    if chunk:
        yield chunk
