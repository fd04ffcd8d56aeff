"""Local tokens as int8: a number is its int8 times a float16 scale that 64 channels of a token share.

Both ways go through blocks of rows that stay in a core's cache, which is two to four times as fast as whole tensors.
Shape letters: N tokens, D channels, G groups of a token's channels, C channels of a group (64, but of the last one of a
width that is no multiple).
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Iterator

import torch
from torch import Tensor

from longvlm.schemas.recipe import CHANNELS_PER_SCALE

MAX_INT8 = 127
MAX_SCALE = (
    515.5  # of float16, so that 127 of it are no infinity; 127 of them are as many as 126.99 of what 65504 needs
)
_BLOCK_ELEMENTS = 1 << 17  # half a megabyte of float32


def num_groups(dim: int) -> int:
    """Scales of a token of so many channels."""
    return -(-dim // CHANNELS_PER_SCALE)


def quantise(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Round float16 numbers [N, D], all finite, to the nearest int8 [N, D] of a scale, float16 [N, G].

    A scale is the smallest that clips nothing: 1/127 of the largest magnitude of its group, rounded up; 0 where all are
    0. Rounding is exact and to even, so that equal numbers give equal bytes on every machine.
    """
    quantised_ND = torch.empty(rows_ND.shape, dtype=torch.int8)
    scales_NG = torch.empty(len(rows_ND), num_groups(rows_ND.shape[1]), dtype=torch.float16)
    for rows_NGC, to_NGC, scale_NG in _blocks(rows_ND, quantised_ND, scales_NG):
        values_NGC = rows_NGC.float()
        scale_NG.copy_(_scales(values_NGC.abs().amax(dim=-1)))
        divisor_NG1 = scale_NG.float().masked_fill_(scale_NG == 0, 1.0).unsqueeze(-1)
        to_NGC.copy_(values_NGC.div_(divisor_NG1).round_())
    return quantised_ND, scales_NG


def check(quantised_ND: Tensor, scales_NG: Tensor) -> None:
    """Raise ValueError where int8 and scales are not as `quantise` makes them, and might stand for infinities."""
    lowest, highest = (end.item() for end in scales_NG.float().aminmax())
    if not (lowest >= 0 and highest <= MAX_SCALE):  # of NaN neither holds
        raise ValueError(f"some values in scales are not between 0 and {MAX_SCALE}")
    if quantised_ND.numpy().min() < -MAX_INT8:
        raise ValueError(f"some values in local are below -{MAX_INT8}")


def dequantise(quantised_ND: Tensor, scales_NG: Tensor, out_ND: Tensor, scratch: Tensor) -> None:
    """Write what int8 [N, D] and scales [N, G], in float32, stand for into float16 [N, D], each number rounded once.

    `scratch`, as `make_scratch` gives it, serves many calls: to allocate it takes as long as a short video.
    """
    for quantised_NGC, out_NGC, scales_NG1 in _blocks(quantised_ND, out_ND, scales_NG.unsqueeze(-1)):
        values_NGC = scratch[: quantised_NGC.numel()].view(quantised_NGC.shape)
        out_NGC.copy_(values_NGC.copy_(quantised_NGC).mul_(scales_NG1))


def make_scratch(dim: int) -> Tensor:
    """Memory for a block of tokens of so many channels."""
    return torch.empty(max(_BLOCK_ELEMENTS, dim))


def _scales(largest_NG: Tensor) -> Tensor:
    """The smallest float16 scales [N, G] of which 127 reach the largest magnitudes, as far as `MAX_SCALE`."""
    scales_NG = (largest_NG / MAX_INT8).half()
    is_short_NG = scales_NG.float() * MAX_INT8 < largest_NG  # exact: 11 and 7 bits
    scales_NG.view(torch.int16).add_(is_short_NG)  # the next float16 up
    return scales_NG.clamp_(max=MAX_SCALE)


def _blocks(from_ND: Tensor, to_ND: Tensor, scales_NG: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of rows of both tensors by group, [n, G, C], with scales [n, G, ..]; a short last group by itself."""
    num_rows, dim = from_ND.shape
    whole = dim - dim % CHANNELS_PER_SCALE
    most_rows = max(_BLOCK_ELEMENTS // dim, 1)
    for start in range(0, num_rows, most_rows):
        rows_nD, to_nD, scales_nG = from_ND, to_ND, scales_NG
        if num_rows > most_rows:  # views of all of a short video take longer than to compute it
            block = slice(start, start + most_rows)
            rows_nD, to_nD, scales_nG = from_ND[block], to_ND[block], scales_NG[block]
        if dim != whole:
            yield rows_nD[:, None, whole:], to_nD[:, None, whole:], scales_nG[:, -1:]
            rows_nD, to_nD, scales_nG = rows_nD[:, :whole], to_nD[:, :whole], scales_nG[:, :-1]
        if whole:
            shape = (rows_nD.shape[0], -1, CHANNELS_PER_SCALE)
            yield rows_nD.view(shape), to_nD.view(shape), scales_nG
