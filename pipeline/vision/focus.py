"""Focus on a question: the segments nearest to it as stored, the rest of the video merged to a few tokens beside them.

A layout is blocks of neighbouring segments in time order, each with a number of tokens. Segments that a question is
about stand alone with all their tokens; between them, what is left of the video is merged as one block a segment, or
as blocks of several where these would take more than their share of the budget: the skeleton. No segment is left out,
so that an answer still knows what came before and after.

Shape letters: S segments, B blocks.
"""

# ruff: noqa: N803, N806 - arrays are named by their shape

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvlm.pipeline.vision.budget import Budget, even_sizes, joined, merged, room_for, shares
from longvlm.pipeline.vision.tokens import VideoTokens

SKELETON_TOKENS = 2  # of a block of the rest
COARSE_TOKENS = 8  # of each segment, that the rest is merged from: so far merging is the same for all questions
SKELETON_SHARE = 1 / 3  # of what a budget leaves for segments: at most so much goes to the rest


@dataclass(frozen=True)
class Layout:
    """How a video is shown: which neighbours stand together, and with how many tokens."""

    members: tuple[int, ...]  # B: segments of each block, in time order
    targets: tuple[int, ...]  # B: tokens of each
    alone: tuple[int, ...]  # the segments nearest to the question, each a block; the other blocks are the rest
    kept: tuple[int, ...]  # those of them that keep all their tokens, or all that `tokens_per_segment` allows


def gives_way(video: VideoTokens, budget: Budget) -> bool:
    """Whether less may be shown of a video than all segments with all that `tokens_per_segment` allows."""
    return bool((_most_tokens(video, budget) + budget.num_beside).sum() > room_for(video, budget))


def lay_out(video: VideoTokens, budget: Budget, nearness: Tensor) -> Layout | None:
    """What a question sees of a video: as many of the nearest segments as fit, whole, beside a skeleton of the rest.

    The skeleton has `SKELETON_TOKENS` for each other segment; where that is more than `SKELETON_SHARE` of the room,
    neighbours are joined until it is not, but for one block between any two segments that stand alone. What is left
    over goes to the next nearest segment, merged to what there is room for, or if that is as little as others have, to
    the skeleton. Whether a block is nearest or rest, all that stands beside it counts.

    Args:
        video: as stored.
        budget: what the prompt may hold of it.
        nearness: [S]: how near each segment is to the question; NaN where that is not known, which is farther than any.

    Returns:
        None where nothing has to give way, or where there is no room for the nearest segment beside the rest: `fit`
        says what is shown then.

    Raises:
        ValueError: there is not one nearness a segment.
    """
    if nearness.shape != (len(video.counts),):
        raise ValueError(f"focus question needs the nearness of each of the {len(video.counts)} segments")
    room, beside = room_for(video, budget), budget.num_beside
    caps_S = _most_tokens(video, budget)
    if not gives_way(video, budget):
        return None
    nearest = (-nearness.double().numpy()).argsort(kind="stable")  # NaN comes last, and of equals the earlier first
    whole_S, least_S = np.cumsum((caps_S + beside)[nearest]), np.minimum(caps_S, SKELETON_TOKENS) + beside
    rest_S = least_S.sum() - np.cumsum(least_S[nearest])
    gaps_S = _num_gaps(nearest)
    skeleton_S = np.minimum(rest_S, np.maximum(int(room * SKELETON_SHARE), gaps_S * (1 + beside)))
    num_kept = int((whole_S + skeleton_S <= room).nonzero()[0].max(initial=-1)) + 1
    left = room - (whole_S[num_kept - 1] if num_kept else 0)
    next_tokens = int(min(left - skeleton_S[num_kept] - beside, caps_S[nearest[num_kept]]))
    has_next = next_tokens > min(SKELETON_TOKENS, caps_S[nearest[num_kept]] - 1)
    if not num_kept and not has_next:
        return None
    num_alone = num_kept + has_next
    members, is_alone_B = _blocks(nearest[:num_alone], len(caps_S), int(skeleton_S[num_alone - 1]), beside)
    starts_B = np.cumsum(members) - members
    targets_B = caps_S[starts_B]
    if has_next:
        targets_B[starts_B == nearest[num_kept]] = next_tokens
    for_rest = room - beside * len(members) - int(targets_B[is_alone_B].sum())
    caps_B = np.add.reduceat(np.minimum(caps_S, COARSE_TOKENS), starts_B)
    targets_B[~is_alone_B] = shares(caps_B[~is_alone_B], for_rest)
    num_kept += has_next and next_tokens == caps_S[nearest[num_kept]]
    alone, kept = (tuple(sorted(nearest[:number].tolist())) for number in (num_alone, num_kept))
    return Layout(tuple(members.tolist()), tuple(targets_B.tolist()), alone, kept)


def coarsened(video: VideoTokens, budget: Budget) -> VideoTokens:
    """The video as the rest of any layout is merged from it, whatever the question."""
    return merged(video, np.minimum(video.counts, COARSE_TOKENS), budget)


def show(video: VideoTokens, coarse: VideoTokens, layout: Layout, budget: Budget) -> VideoTokens:
    """The video as a layout has it: segments that are kept bit for bit, the others merged on from `coarsened`."""
    is_alone_S = np.zeros(len(video.counts), bool)
    is_alone_S[list(layout.alone)] = True
    mixed = _mixed(video, coarse, is_alone_S)
    return merged(joined(mixed, layout.members, budget, is_alone_S), np.array(layout.targets), budget)


def _mixed(video: VideoTokens, coarse: VideoTokens, is_fine_S: NDArray[np.bool_]) -> VideoTokens:
    """Some segments as they are, the others coarse."""
    edges = [0, *(np.flatnonzero(np.diff(is_fine_S)) + 1).tolist(), len(is_fine_S)]
    parts = []
    for start, end in pairwise(edges):
        source = video if is_fine_S[start] else coarse
        parts.append((source, slice(sum(source.counts[:start]), sum(source.counts[:end]))))
    return replace(
        video,
        local=torch.cat([source.local[rows].float() for source, rows in parts]),
        sizes=torch.cat([source.sizes[rows] for source, rows in parts]),
        spans=torch.cat([source.spans[rows] for source, rows in parts]),
        counts=tuple(np.where(is_fine_S, video.counts, coarse.counts).tolist()),
        positions=None
        if video.positions is None
        else torch.cat([source.positions[rows] for source, rows in parts if source.positions is not None]),
    )


def _most_tokens(video: VideoTokens, budget: Budget) -> NDArray[np.int64]:
    return np.minimum(video.counts, budget.tokens_per_segment or max(video.counts))


def _num_gaps(nearest: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many runs the rest of a video falls into once the nearest 1, 2, ... segments stand alone, [S]."""
    num_segments = len(nearest)
    place_S = np.empty(num_segments, np.int64)
    place_S[nearest] = np.arange(num_segments)
    # a run begins at a segment that is not alone yet, while the one before it is
    before_S = np.concatenate([[-1], place_S[:-1]])
    begins = before_S < place_S
    change = np.zeros(num_segments + 1, np.int64)
    np.add.at(change, np.maximum(before_S[begins], 0), 1)
    np.add.at(change, place_S[begins], -1)
    return np.cumsum(change)[:num_segments]


def _blocks(
    alone: NDArray[np.int64], num_segments: int, skeleton_rows: int, beside: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Segments of each block, [B], and which blocks are a segment that stands alone."""
    is_alone_S = np.zeros(num_segments, bool)
    is_alone_S[alone] = True
    begins = np.flatnonzero(is_alone_S | np.concatenate([[True], is_alone_S[:-1]]))
    lengths = np.diff([*begins, num_segments])
    is_alone_R = is_alone_S[begins]
    gaps = lengths[~is_alone_R]
    num_blocks = min(max(skeleton_rows // (SKELETON_TOKENS + beside), len(gaps)), int(gaps.sum()))
    # each gap is a block, and further ones are shared out by how many segments a gap has besides
    further = np.cumsum(gaps - 1) * (num_blocks - len(gaps)) // max(int((gaps - 1).sum()), 1)
    parts = iter(1 + np.diff(further, prepend=0))
    members = [
        [1] if single else even_sizes(int(length), int(next(parts)))
        for length, single in zip(lengths, is_alone_R, strict=True)
    ]
    sizes = [len(part) for part in members]
    return np.concatenate(members), np.repeat(is_alone_R, sizes)
