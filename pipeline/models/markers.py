"""Time markers: after a segment's rows, the text of when it began, so that a language model can tell one from another.

Whether a prompt has them is a setting of the model (`mm_prompt_layout` in its config.json), read by training and
answering alike. Rows of markers are rows of the video: they count as visual tokens, and what an answer attends to in
them belongs to their segment.

Shape letters: N prefix rows, M rows with markers, S segments, T tokens of all markers, D model width.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longvlm.pipeline.models.contract import Timeline
from longvlm.pipeline.transfer import tensor_on, to_device
from longvlm.pipeline.vision.tokens import VideoTokens


def timeline_of(video: VideoTokens, segments: Sequence[Mapping[str, Any]], num_global: int) -> Timeline:
    """Where the segments of a prefix lie and when each began, also after a budget has joined or left out some.

    Args:
        video: as it goes into the prefix.
        segments: the video's rows of the table `segments` (start_s, first_frame), in time order.
        num_global: rows of the prefix before the local tokens.
    """
    counts = np.array(video.counts, dtype=np.int64)
    first_frame_S = np.minimum.reduceat(video.spans[:, 0].numpy(), np.cumsum(counts) - counts)
    stored = np.searchsorted([segment["first_frame"] for segment in segments], first_frame_S, side="right") - 1
    starts_s = tuple(float(segments[i]["start_s"]) for i in np.maximum(stored, 0).tolist())
    return Timeline(num_global, video.counts, starts_s)


def interleave(
    rows_ND: Tensor, timeline: Timeline, markers: Sequence[Sequence[int]], embed: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rows with each segment's marker after its own, [M, D].

    Args:
        rows_ND: projected, global first.
        timeline: of these rows.
        markers: token ids of each segment's marker.
        embed: the language model's embedding.

    Raises:
        ValueError: the timeline is of other rows.
    """
    if len(rows_ND) != timeline.num_rows:
        raise ValueError(f"a timeline of {timeline.num_rows} rows was given for {len(rows_ND)}")
    ids_T = tensor_on(rows_ND.device, [token for marker in markers for token in marker])
    is_marker_M = to_device(_is_marker(timeline, [len(marker) for marker in markers]), rows_ND.device)
    rows_MD = rows_ND.new_empty(len(is_marker_M), rows_ND.shape[1])
    rows_MD = rows_MD.masked_scatter(is_marker_M[:, None], embed(ids_T).to(rows_ND.dtype))
    return rows_MD.masked_scatter(~is_marker_M[:, None], rows_ND)


def onto_segments(seen_M: Tensor, timeline: Timeline, lengths: Sequence[int]) -> Tensor:
    """Attention to rows with markers as attention to the rows alone, [N].

    What a marker drew is shared equally among the local rows of its segment.

    Args:
        seen_M: attention to each row.
        timeline: of the N rows.
        lengths: how many tokens each segment's marker has.
    """
    is_marker_M = _is_marker(timeline, lengths).to(seen_M.device)
    counts_S, lengths_S = (torch.tensor(numbers, device=seen_M.device) for numbers in (timeline.counts, lengths))
    segments = torch.arange(len(counts_S), device=seen_M.device)
    drawn_S = seen_M.new_zeros(len(counts_S))
    drawn_S.index_add_(0, segments.repeat_interleave(lengths_S), seen_M[is_marker_M])
    seen_N = seen_M[~is_marker_M]
    seen_N[timeline.num_global :] += (drawn_S / counts_S).repeat_interleave(counts_S)
    return seen_N


def _is_marker(timeline: Timeline, lengths: Sequence[int]) -> Tensor:
    """Which of the M rows are markers, bool [M]."""
    pieces = chain([timeline.num_global], *zip(timeline.counts, lengths, strict=True))
    kinds = torch.tensor([False] + [False, True] * len(lengths))
    return kinds.repeat_interleave(torch.tensor(list(pieces)))
