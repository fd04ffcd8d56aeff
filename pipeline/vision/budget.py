"""Stored tokens cut to a budget when they are read: merged further, and where that is not enough, neighbours joined.

Merging goes on where the stored merge stopped, in float32 and with its sizes, so that a segment stored with 80 tokens
and read with 30 is what an index of 30 would have held, up to the rounding of float16.

Shape letters: S segments, K tokens of a segment, N of all segments, D channels.
"""

# ruff: noqa: N803, N806 - tensors and arrays are named by their shape

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray

from longvlm.pipeline.vision.merge import Merged, MergeMetric, merge_on
from longvlm.pipeline.vision.tokens import VideoTokens
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import Focus, halving_schedule

# A budget holds a segment if it has this many tokens for it: one for each of the ten frames that a segment of `paper`
# and `long` has. With fewer, the moments of a segment melt together, and fewer segments say more.
HELD_TOKENS = 10
# Neighbours merged as one are at most this many tokens, a segment of the paper before merging: the scores of a merge
# grow with the square. Longer runs are merged in rounds of 32 neighbours.
_MAX_RUN_TOKENS, _NEIGHBOURS = 2560, 32
_MAX_MERGED_AT_ONCE = 16384  # tokens: 64 MB in float32 at width 1024; more only leave the cache


@dataclass(frozen=True)
class Budget:
    """How many rows a prompt may hold of a video, and what gives way where that is too few."""

    max_tokens: int | None = None  # visual tokens of a prefix, global ones included; None: as many as are stored
    tokens_per_segment: int | None = None  # local ones of a segment, at most; None: as many as are stored
    focus: Focus | None = None  # what gives way (see `fit` and `focus.lay_out`); None: nothing but detail does
    num_global: int = 0  # rows that the prefix will have ahead of its segments; they count
    num_beside: int = 0  # rows that it will have beside each block of tokens (markers of time); they count as well
    frames_per_block: int | None = None  # of a video of which nothing is merged; None, and once it is: a segment
    num_streams: int = 1  # of a token; the first decides merging

    def holds(self, video: VideoTokens) -> bool:
        """Whether all that is stored of a video is within `max_tokens`."""
        return self.max_tokens is None or self.num_global + _stored_rows(video, self) <= self.max_tokens


def fit(video: VideoTokens, budget: Budget) -> VideoTokens:
    """A video's tokens within a budget, in time order; the same object if they are within it already.

    `tokens_per_segment` caps every segment, `max_tokens` caps their sum: every segment gets the same share, or all that
    it has, and what is left is handed out evenly over time. If that would leave segments with fewer than `HELD_TOKENS`
    (or `tokens_per_segment`), so that only H of them can be held, H runs of neighbours, equally long up to one segment,
    are merged as if each were a segment. Without a focus they are not: segments get what there is, one token at least.
    What focus question shows, where there is room for it, is said by `focus.lay_out`.

    Raises:
        TerminalError: (budget_too_small) there is no room beside the global tokens, or without a focus none for one
            token a segment.
    """
    counts, beside, room = np.array(video.counts), budget.num_beside, room_for(video, budget)
    cap = budget.tokens_per_segment or int(counts.sum())
    if room < 1 + beside:
        raise TerminalError(
            ErrorCode.BUDGET_TOO_SMALL,
            f"a budget of {budget.max_tokens} visual tokens has no room beside {budget.num_global} global ones; raise "
            "--budget.",
        )
    if not _is_held(counts, budget, room):
        if budget.focus is None and len(counts) * (1 + beside) > room:
            raise TerminalError(
                ErrorCode.BUDGET_TOO_SMALL,
                f"a budget of {budget.max_tokens} visual tokens, {budget.num_global} of them global, is less than one "
                f"for each of the {len(counts)} segments; raise --budget, or use --focus even to merge neighbouring "
                "segments or --focus question to keep those nearest to the question.",
            )
        if budget.focus is not None:
            num_held = max(room // (_held_tokens(counts, budget) + beside), 1)
            video = joined(video, even_sizes(len(counts), num_held), budget)
    targets = shares(np.minimum(video.counts, cap), room - beside * len(video.counts))
    if _stored_rows(video, budget) > room and (targets == video.counts).all():
        targets[targets.argmax()] -= 1  # a block a segment would do, and that is what a video has once it is merged
    return merged(video, targets, budget)


def room_for(video: VideoTokens, budget: Budget) -> int:
    """How many rows the budget leaves for local tokens and what stands beside them."""
    return _stored_rows(video, budget) if budget.max_tokens is None else budget.max_tokens - budget.num_global


def _stored_rows(video: VideoTokens, budget: Budget) -> int:
    """Rows for all local tokens that are stored, and for what stands beside them."""
    num_blocks = len(video.counts)
    if budget.num_beside and budget.frames_per_block and video.num_whole_frames is not None:
        num_blocks = sum(-(-number // budget.frames_per_block) for number in video.num_frames)
    return sum(video.counts) + budget.num_beside * num_blocks


def _held_tokens(counts: NDArray[np.int64], budget: Budget) -> int:
    """With how many tokens a segment counts as held; not more than any has or may have."""
    return min(HELD_TOKENS, budget.tokens_per_segment or HELD_TOKENS, int(counts.max()))


def _is_held(counts: NDArray[np.int64], budget: Budget, room: int) -> bool:
    return bool((np.minimum(counts, _held_tokens(counts, budget)) + budget.num_beside).sum() <= room)


def shares(caps: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """The largest equal share of `room` for all, at most their caps; what is left goes one each, evenly over time."""
    if caps.sum() <= room:
        return caps
    share = int(np.searchsorted([np.minimum(caps, k).sum() for k in range(int(caps.max()) + 1)], room, "right")) - 1
    given = np.minimum(caps, share)
    wanting = np.flatnonzero(caps > share)
    given[wanting[_spread(len(wanting), room - int(given.sum()))]] += 1
    return given


def _spread(num_places: int, num_chosen: int) -> NDArray[np.int64]:
    """Which of some places to choose so that they are even: the middles of equal parts."""
    return (2 * np.arange(num_chosen) + 1) * num_places // (2 * max(num_chosen, 1))


def joined(
    video: VideoTokens, members: Sequence[int], budget: Budget, is_alone_S: NDArray[np.bool_] | None = None
) -> VideoTokens:
    """Runs of neighbours as one segment each, none with more tokens than a merge can take.

    Args:
        video: with all its segments.
        members: how many segments each run has, in time order.
        budget: says of how many streams a token is.
        is_alone_S: which segments are left as they are, however many tokens they have; each is a run by itself.
    """
    is_alone_S = np.zeros(len(video.counts), bool) if is_alone_S is None else is_alone_S
    while True:
        starts = np.cumsum(members) - members
        runs, is_alone_R = _side_by_side(video, members), is_alone_S[starts]
        if _longest(runs, is_alone_R) <= _MAX_RUN_TOKENS:
            return runs
        within = [even_sizes(number, -(-number // _NEIGHBOURS)) for number in members]
        video = _capped(video, budget, is_alone_S)
        if _longest(_side_by_side(video, members), is_alone_R) > _MAX_RUN_TOKENS:
            sizes = list(chain.from_iterable(within))
            is_alone_S = is_alone_S[np.cumsum(sizes) - sizes]
            video = _capped(_side_by_side(video, sizes), budget, is_alone_S)
            members = [len(parts) for parts in within]


def _longest(runs: VideoTokens, is_alone_R: NDArray[np.bool_]) -> int:
    """Tokens of the longest run that is to be merged."""
    return int(np.where(is_alone_R, 0, runs.counts).max())


def _capped(video: VideoTokens, budget: Budget, is_alone_S: NDArray[np.bool_]) -> VideoTokens:
    counts = np.array(video.counts)
    targets = np.where(is_alone_S, counts, np.minimum(counts, _MAX_RUN_TOKENS // _NEIGHBOURS))
    return merged(video, targets, budget)


def _side_by_side(video: VideoTokens, members: Sequence[int]) -> VideoTokens:
    """Each run of so many neighbours as one segment: their tokens lie side by side already."""
    starts = [0, *accumulate(members)][:-1]
    counts, num_frames = (np.add.reduceat(part, starts).tolist() for part in (video.counts, video.num_frames))
    return replace(video, counts=tuple(counts), num_frames=tuple(num_frames))


def even_sizes(number: int, num_parts: int) -> list[int]:
    """Sizes of parts that differ by at most one."""
    return np.diff(np.arange(num_parts + 1) * number // num_parts).tolist()


def merged(video: VideoTokens, targets: NDArray[np.int64], budget: Budget) -> VideoTokens:
    """Every segment merged on to its target, segments with equal counts and targets together."""
    counts = np.array(video.counts)
    if (counts == targets).all():
        return video
    num_tokens, metric = int(targets.sum()), MergeMetric(num_channels=video.dim // budget.num_streams)
    local_ND = torch.empty(num_tokens, video.dim)
    sizes_N = torch.empty(num_tokens, dtype=torch.int64)
    spans_N2 = torch.empty(num_tokens, 2, dtype=torch.int64)
    positions_N3 = None if video.positions is None else torch.empty(num_tokens, 3, dtype=torch.float64)
    from_S, to_S = (torch.from_numpy(np.cumsum(numbers) - numbers) for numbers in (counts, targets))
    for count, target in sorted(set(zip(counts.tolist(), targets.tolist(), strict=True))):
        members = torch.from_numpy(np.flatnonzero((counts == count) & (targets == target)))
        at_once = max(_MAX_MERGED_AT_ONCE // count, 1)
        for part in (members[i : i + at_once] for i in range(0, len(members), at_once)):
            from_SK, to_SK = from_S[part, None] + torch.arange(count), to_S[part, None] + torch.arange(target)
            positions = None if video.positions is None else video.positions[from_SK]
            on = Merged(video.local[from_SK], video.sizes[from_SK], video.spans[from_SK], positions)
            if target < count:  # a segment that stays is copied bit for bit
                on = merge_on(on, halving_schedule(count, target), metric)
            local_ND[to_SK], sizes_N[to_SK], spans_N2[to_SK] = on.tokens.float(), on.sizes, on.spans
            if positions_N3 is not None and on.positions is not None:
                positions_N3[to_SK] = on.positions
    return replace(
        video,
        local=local_ND,
        sizes=sizes_N,
        spans=spans_N2,
        counts=tuple(targets.tolist()),
        positions=positions_N3,
    )
