"""Time markers: after a segment's rows, the text of when it began, so that a language model can tell one from another.

Whether a prompt has them is a setting of the model (`mm_prompt_layout` in its config.json), read by training and
answering alike. Rows of markers are rows of the video: they count as visual tokens, and what an answer attends to in
them belongs to their segment.

Shape letters: N prefix rows, M rows with markers, S segments, T tokens of all markers, D model width.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from longvlm.pipeline.models.prefix import SegmentTimes
from longvlm.pipeline.transfer import tensor_on, to_device


def interleave(
    rows_ND: Tensor, times: SegmentTimes, markers: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rows with each segment's marker after its own, [M, D].

    Args:
        rows_ND: projected, global first.
        times: of these rows.
        markers: token ids of each segment's marker.
        embed: the language model's embedding.
    """
    ids_T = tensor_on(rows_ND.device, [token for marker in markers for token in marker])
    is_marker_M = to_device(_is_marker(times, [len(marker) for marker in markers]), rows_ND.device)
    rows_MD = rows_ND.new_empty(len(is_marker_M), rows_ND.shape[1])
    rows_MD = rows_MD.masked_scatter(is_marker_M[:, None], embed(ids_T).to(rows_ND.dtype))
    return rows_MD.masked_scatter(~is_marker_M[:, None], rows_ND)


def onto_segments(seen_M: Tensor, times: SegmentTimes, lengths: Sequence[int]) -> Tensor:
    """Attention to rows with markers as attention to the rows alone, [N].

    What a marker drew is shared equally among the local rows of its segment.

    Args:
        seen_M: attention to each row.
        times: of the N rows.
        lengths: how many tokens each segment's marker has.
    """
    is_marker_M = _is_marker(times, lengths).to(seen_M.device)
    counts_S, lengths_S = (torch.tensor(numbers, device=seen_M.device) for numbers in (times.counts, lengths))
    segments = torch.arange(len(counts_S), device=seen_M.device)
    drawn_S = seen_M.new_zeros(len(counts_S))
    drawn_S.index_add_(0, segments.repeat_interleave(lengths_S), seen_M[is_marker_M])
    seen_N = seen_M[~is_marker_M]
    seen_N[times.num_global :] += (drawn_S / counts_S).repeat_interleave(counts_S)
    return seen_N


def _is_marker(times: SegmentTimes, lengths: Sequence[int]) -> Tensor:
    """Which of the M rows are markers, bool [M]."""
    pieces = chain([times.num_global], *zip(times.counts, lengths, strict=True))
    kinds = torch.tensor([False] + [False, True] * len(lengths))
    return kinds.repeat_interleave(torch.tensor(list(pieces)))
