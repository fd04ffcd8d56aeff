"""Attention of many questions over few videos: each video's keys and values are kept once, whoever asks about it.

A forward pass is given the tokens of all its rows in one line, without padding, so that every matrix product but
attention's sees only real tokens. Attention then takes the line apart again: against the prefix of a video, all tokens
that ask about it are one matrix product; against what follows the prefix, each row is one of its own; one softmax goes
over both.

Shape letters: T tokens of the pass, S sequences, R rows, P prefix positions, L tail positions, H query heads, K key
heads, G query heads of a key head (H / K), d channels of a head, W watched tokens, Q tokens of some suffixes.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from longvlm.pipeline.transfer import tensor_on, to_device

# Keys and values have room for a multiple of so many positions: a GPU's fast products take rows of 16 bytes.
POSITIONS_TOGETHER = 8
MAX_TOKENS_TOGETHER = 256  # of one video's suffixes in a call: the work for what the mask hides grows with the square


def rounded_up(num_positions: int) -> int:
    """The room that keys and values of so many positions take."""
    return -(-num_positions // POSITIONS_TOGETHER) * POSITIONS_TOGETHER


@dataclass(eq=False)
class KeysValues:
    """Keys and values of a number of sequences by layer, [2, S, K, positions, d] each; zeros beyond their ends."""

    layers: list[Tensor] = field(default_factory=list)

    @property
    def num_positions(self) -> int:
        """Room for tokens in each sequence."""
        return self.layers[0].shape[3] if self.layers else 0

    def select_and_append(self, kept: Sequence[int], more: "KeysValues", num_positions: int) -> None:
        """Keep some sequences, append others, and give all of them room: a layer at a time, to save memory."""
        mine, new = self.layers, more.layers
        kept_S = tensor_on((mine or new)[0].device, kept)
        for layer in range(max(len(mine), len(new))):
            parts = [mine[layer].index_select(1, kept_S)] if kept else []
            if new:
                parts.append(new[layer])
                new[layer] = None  # type: ignore[call-overload] # given up, so that it is not held twice
            wide = [pad(part, (0, 0, 0, num_positions - part.shape[3])) for part in parts]
            mine[layer : layer + 1] = [torch.cat(wide, dim=1) if len(wide) > 1 else wide[0]]

    def write(self, layer: int, row_T: Tensor, position_T: Tensor, kv_T2Kd: Tensor) -> None:
        """Put the keys and values of some tokens where they belong."""
        self.layers[layer][:, row_T, :, position_T] = kv_T2Kd

    def clear(self) -> None:
        """Forget everything."""
        self.layers.clear()


class PrefixAttention:
    """Prefill of some videos' prefixes, which do not see each other; their keys and values are kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.made = KeysValues()

    def attend(self, layer: int, query_THd: Tensor, kv_T2Kd: Tensor, scaling: float) -> Tensor:
        """Causal attention within each prefix."""
        if layer != len(self.made.layers):
            raise ValueError(f"layer {layer} came after {len(self.made.layers)} others")
        queries, kv_parts = torch.split(query_THd, self.lengths), torch.split(kv_T2Kd, self.lengths)
        mixed = [
            _fused(query_PHd, kv_P2Kd[:, 0], kv_P2Kd[:, 1], scaling)
            for query_PHd, kv_P2Kd in zip(queries, kv_parts, strict=True)
        ]
        kv_SP2Kd = pad_sequence(list(kv_parts), batch_first=True)
        self.made.layers.append(kv_SP2Kd.permute(2, 0, 3, 1, 4).contiguous())
        return torch.cat(mixed)


class AttentionTotals:
    """Attention to the prefix in some layers, summed up as it happens."""

    def __init__(self, layers: frozenset[int]) -> None:
        self._layers = layers
        self._total_TP: Tensor | None = None

    def wants(self, layer: int) -> bool:
        """Whether this is one of the layers."""
        return layer in self._layers

    def look(self, layer: int, weights_TKGP: Tensor) -> None:
        """Add a layer's attention to the prefix, if it is one of them."""
        if layer in self._layers:
            mean_TP = weights_TKGP.mean(dim=(1, 2), dtype=torch.float32)
            self._total_TP = mean_TP if self._total_TP is None else self._total_TP.add_(mean_TP)

    @property
    def seen(self) -> Tensor:
        """The mean over heads and layers, float32 [T, P], once a pass has gone through them."""
        if self._total_TP is None:
            raise ValueError("none of the layers has been looked at")
        return self._total_TP / len(self._layers)


class _Grid:
    """Tokens sorted into bins of one size, so that one batched product serves each bin with its own matrix."""

    def __init__(self, bin_T: Sequence[int], num_bins: int, like: Tensor) -> None:
        """Where each token goes; tokens and matrices are of a device and type `like` another tensor."""
        fill = [0] * num_bins
        places = []
        for bin_ in bin_T:
            places.append((bin_, fill[bin_]))
            fill[bin_] += 1
        self.num_bins, self.width = num_bins, max(fill)
        place_T = torch.tensor([bin_ * self.width + place for bin_, place in places])
        token_of_place = torch.zeros(num_bins * self.width, dtype=torch.int64)
        token_of_place[place_T] = torch.arange(len(bin_T))
        self.is_sorted = torch.equal(token_of_place, torch.arange(len(bin_T)))  # and no place is without a token
        self._nothing = like.new_empty(1, 1, 1)
        self.place_T = to_device(place_T, like.device)
        self.token_of_place = to_device(token_of_place, like.device)  # places without a token compute token 0 once more

    def product(self, tokens_TKGx: Tensor, bins_Zxy: Tensor, factor: float = 1.0) -> Tensor:
        """Each token's [K, G, x] times its bin's [K, x, y] (one of Z = bins x K) and a factor: [T, K, G, y]."""
        num_t, num_k, num_g, _ = tokens_TKGx.shape
        if self.is_sorted and self.width == 1:
            return self._times(tokens_TKGx.flatten(0, 1), bins_Zxy, factor).view(num_t, num_k, num_g, -1)
        by_place = tokens_TKGx if self.is_sorted else tokens_TKGx[self.token_of_place]
        sorted_ = by_place.view(self.num_bins, self.width, num_k, num_g, -1).transpose(1, 2)
        made = self._times(sorted_.reshape(self.num_bins * num_k, self.width * num_g, -1), bins_Zxy, factor)
        made = made.view(self.num_bins, num_k, self.width, num_g, -1).transpose(1, 2)
        by_place = made.reshape(self.num_bins * self.width, num_k, num_g, -1)
        return by_place if self.is_sorted else by_place[self.place_T]

    def _times(self, left_Zwx: Tensor, right_Zxy: Tensor, factor: float) -> Tensor:
        """Left times right times a factor, which costs no pass of its own."""
        return torch.baddbmm(self._nothing, left_Zwx, right_Zxy, beta=0, alpha=factor)


@dataclass(frozen=True)
class PrefixEnds:
    """Where the prefixes of some videos end: how many keys each has, and the position of what follows them."""

    lengths: Sequence[int]
    positions: Sequence[int]


class TailAttention:
    """Attention of tokens that stand in tails, behind prefixes: in decoding, a token a row and step.

    Token t belongs to row `rows[t]`, whose tail it extends at `positions[t]`, counted from the end of the prefix. All
    tensors but the positions stay what they are from step to step.
    """

    def __init__(
        self,
        prefixes: KeysValues,
        tails: KeysValues,
        ends: PrefixEnds,
        video_of_row: Sequence[int],
        rows: Sequence[int],
    ) -> None:
        like = prefixes.layers[0]
        device = like.device
        self.prefixes, self.tails = prefixes, tails
        # by layer what products take: keys [Z, d, positions] and values [Z, positions, d], of prefixes and tails
        self._factors = [
            (before[0].flatten(0, 1).mT, after[0].flatten(0, 1).mT, before[1].flatten(0, 1), after[1].flatten(0, 1))
            for before, after in zip(prefixes.layers, tails.layers, strict=True)
        ]
        videos = [video_of_row[row] for row in rows]
        self._by_video = _Grid(videos, len(ends.lengths), like)
        self._by_row = _Grid(rows, len(video_of_row), like)
        self._row_T = tensor_on(device, rows)
        self._end_T = tensor_on(device, [ends.positions[video] for video in videos])
        length_T = tensor_on(device, [ends.lengths[video] for video in videos])
        self._columns_L = torch.arange(tails.num_positions, device=device)
        self._in_prefix_TP = torch.arange(prefixes.num_positions, device=device) < length_T[:, None]

    def begin(self, positions_T: Tensor, totals: AttentionTotals) -> Tensor:
        """Prepare a pass whose tokens stand at some positions of their tails.

        Returns:
            positions [T], counted from the beginning of the prompt.
        """
        self._position_T, self.totals = positions_T, totals
        visible_TX = torch.cat([self._in_prefix_TP, self._columns_L <= positions_T[:, None]], dim=1)
        self._hidden_TX = ~visible_TX[:, None, None]
        return self._end_T + positions_T

    def attend(self, layer: int, query_THd: Tensor, kv_T2Kd: Tensor, scaling: float) -> Tensor:
        """Attention of each token over its video's prefix and its own row so far, itself included."""
        self.tails.write(layer, self._row_T, self._position_T, kv_T2Kd)
        weights_TKGX = self.weights(layer, query_THd, scaling)
        _, _, before, after = self._factors[layer]
        num_p = self.prefixes.num_positions
        mixed_TKGd = self._by_video.product(weights_TKGX[..., :num_p], before)
        mixed_TKGd += self._by_row.product(weights_TKGX[..., num_p:], after)
        return mixed_TKGd.flatten(1, 2)

    def weights(self, layer: int, query_THd: Tensor, scaling: float) -> Tensor:
        """How much each token attends to each position of its prefix, then of its tail: [T, K, G, P + L]."""
        before, after, _, _ = self._factors[layer]
        (num_t, _, width), num_k = query_THd.shape, self.tails.layers[layer].shape[2]
        query_TKGd = query_THd.view(num_t, num_k, -1, width)
        # tails are taken with all the room they have: a slice would be copied by each product
        scores = (
            self._by_video.product(query_TKGd, before, scaling),
            self._by_row.product(query_TKGd, after, scaling),
        )
        scores_TKGX = torch.cat(scores, dim=-1).masked_fill_(self._hidden_TX, float("-inf"))
        weights_TKGX = scores_TKGX.softmax(dim=-1, dtype=torch.float32).to(query_THd.dtype)
        self.totals.look(layer, weights_TKGX[..., : self.prefixes.num_positions])
        return weights_TKGX


@dataclass(frozen=True)
class SuffixPlace:
    """Where a row's suffix goes: the number of its video, the length of that one's prefix, and its own."""

    video: int
    prefix_length: int
    length: int


class SuffixAttention:
    """Prefill of rows' suffixes, which hold their questions: each sees its video's prefix and its own tokens so far.

    Some suffixes of one video are one call of the fused kernel, whose mask hides them from each other: the scores of
    thousands of tokens are never laid out. Only those of watched tokens are, in the layers where they are watched.
    """

    def __init__(
        self, places: Sequence[SuffixPlace], tails: KeysValues, watching: TailAttention, watched_W: Tensor
    ) -> None:
        device, lengths = watched_W.device, [place.length for place in places]
        row_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        self.row_T = to_device(row_T, device)
        self.position_T = to_device(torch.cat([torch.arange(length) for length in lengths]), device)
        self.tails, self.watching, self.watched_W = tails, watching, watched_W
        self.parts: list[tuple[int, int, slice, Tensor]] = []  # video, its prefix's length, tokens, what these may see
        end = 0
        for (video, length), alike in groupby(places, key=lambda place: (place.video, place.prefix_length)):
            for some in chunked([place.length for place in alike], MAX_TOKENS_TOGETHER):
                start, end = end, end + sum(some)
                rows_Q = self.row_T[start:end]
                is_own_QQ = (rows_Q[:, None] == rows_Q).tril()
                visible = torch.cat([is_own_QQ.new_ones(len(rows_Q), length), is_own_QQ], dim=1)
                self.parts.append((video, length, slice(start, end), visible))

    def attend(self, layer: int, query_THd: Tensor, kv_T2Kd: Tensor, scaling: float) -> Tensor:
        """Attention of each token over its video's prefix and its own suffix so far."""
        self.tails.write(layer, self.row_T, self.position_T, kv_T2Kd)
        prefixes_2SKPd = self.watching.prefixes.layers[layer]
        mixed = []
        for video, length, tokens, visible in self.parts:
            seen_2PKd = prefixes_2SKPd[:, video, :, :length].transpose(1, 2)
            keys_XKd, values_XKd = torch.cat([seen_2PKd, kv_T2Kd[tokens].transpose(0, 1)], dim=1)
            mixed.append(_fused(query_THd[tokens], keys_XKd, values_XKd, scaling, visible))
        if self.watching.totals.wants(layer):
            self.watching.weights(layer, query_THd[self.watched_W], scaling)
        return torch.cat(mixed)


def _fused(query_QHd: Tensor, key_XKd: Tensor, value_XKd: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    """One sequence's attention in one kernel, [Q, H, d]: causal where no mask says what may be seen."""
    query, key, value = (part.transpose(0, 1)[None] for part in (query_QHd, key_XKd, value_XKd))
    is_grouped = query.shape[1] != key.shape[1]  # said only where it is so, since it rules fused kernels out
    mixed_1HQd = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
    )
    return mixed_1HQd[0].transpose(0, 1)


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
