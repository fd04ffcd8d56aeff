"""Hierarchical token merging: many patch tokens of a segment become a few weighted means (LONGVLM.md, section 4).

Only the narrow metric takes part in the matching, and the wide tokens are read twice in all: once for the metric, and
once at the end to be summed where the steps sent them. This is possible because the metric is linear in the tokens
and cosine does not see scale: a merged token's metric is the sum of its parts' metrics.

Shape letters: S segments, T tokens before, t tokens at a step, A and B its two halves, K tokens kept, D channels,
C metric channels (D / heads).
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from longvlm.schemas.recipe import METRIC_HEADS

# Scores held at a time. On a CPU one block of 8 MB stays in cache, and its pages are touched once for all segments
# (allocating them anew made the product five times slower); a GPU wants one large product instead (512 MB).
MAX_SCORES_CPU = 1 << 21
MAX_SCORES_GPU = 1 << 27


@dataclass(frozen=True, eq=False, repr=False)
class Merged:
    """Merged tokens [S, K, D] float32, how many inputs each stands for, and what it draws on."""

    tokens: Tensor
    sizes: Tensor  # [S, K] int64
    spans: Tensor  # [S, K, 2] int64: first and last, inclusive
    positions: Tensor | None = None  # [S, K, 3] float64: means, weighted by size

    def __post_init__(self) -> None:
        """Check shapes: all three speak of the same tokens."""
        if self.sizes.shape != self.tokens.shape[:2] or self.spans.shape != (*self.tokens.shape[:2], 2):
            raise ValueError(f"tokens, sizes and spans do not fit together: {self}")

    def __repr__(self) -> str:
        shapes = (tuple(part.shape) for part in (self.tokens, self.sizes, self.spans))
        return "Merged(tokens={}, sizes={}, spans={})".format(*shapes)


@dataclass(frozen=True)
class MergeMetric:
    """The metric of merging: the mean of blocks of a token's leading channels. The other channels go where these go."""

    heads: int = METRIC_HEADS  # how many blocks
    num_channels: int | None = None  # of all blocks; None: all that a token has


@torch.no_grad()
def merge(
    tokens: Tensor,
    schedule: Sequence[int],
    *,
    sizes: Tensor | None = None,
    spans: Tensor | None = None,
    positions: Tensor | None = None,
    metric: MergeMetric = MergeMetric(),
) -> Merged:
    """Merge the tokens of every segment along a schedule, all segments at once, in float32.

    Each step takes min(r, t // 2) even-positioned tokens into their most similar odd-positioned one; the others stay,
    in order of decreasing similarity, before all odd ones (bipartite soft matching, arXiv 2210.09461, section 3, as
    LONGVLM.md section 4 fixes it). Given the `sizes` and `spans` of an earlier result it continues from there, as if
    both schedules had been one. A token of zeros matches nothing better than anything else and spoils no other.

    All shapes follow from the schedule, none from what is matched: on a GPU this only queues the work, and does not
    wait for any of it.

    Args:
        tokens: [S, T, D], any floating dtype; D a multiple of `heads`.
        schedule: how many tokens each step merges away.
        sizes: [S, T], how many inputs each token stands for already; 1 by default.
        spans: [S, T, 2], first and last place (frame numbers, say) each draws on; its own index by default.
        positions: [S, T, 3] float64, where each lies in time and picture; they are averaged as the tokens are.
        metric: by which tokens are similar.

    Raises:
        ValueError: the metric's width is not a multiple of `heads`.
    """
    num_segments, num_tokens, dim = tokens.shape
    width = metric.num_channels or dim
    if width % metric.heads:
        raise ValueError(f"tokens are {width} wide, and their metric needs a multiple of {metric.heads}")
    tokens_STD = tokens.float().contiguous()
    metric_StC = tokens_STD[..., :width].view(num_segments, num_tokens, metric.heads, -1).sum(dim=2)
    if sizes is not None:
        metric_StC *= sizes[..., None]
    positions_T = torch.arange(num_tokens, device=tokens.device)
    targets_ST = positions_T.expand(num_segments, num_tokens)
    scores = _scratch(num_segments, num_tokens, tokens.device)
    for step in schedule:
        num_merged = min(step, metric_StC.shape[1] // 2)
        if num_merged > 0:
            moves_St, metric_StC = _match(metric_StC, num_merged, scores)
            targets_ST = moves_St.gather(1, targets_ST)
    if spans is None:
        spans = positions_T[:, None].expand(num_segments, num_tokens, 2)
    return _gather(tokens_STD, sizes, spans, positions, targets_ST, metric_StC.shape[1])


def merge_on(before: Merged, schedule: Sequence[int], metric: MergeMetric) -> Merged:
    """Merge on what was merged before, see `merge`."""
    tokens, sizes, spans, positions = before.tokens, before.sizes, before.spans, before.positions
    return merge(tokens, schedule, sizes=sizes, spans=spans, positions=positions, metric=metric)


def _match(metric_StC: Tensor, num_merged: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """One step: where each of the t tokens goes, and the metric of the tokens that are then there."""
    num_segments, num_tokens, _ = metric_StC.shape
    unit_StC = normalize(metric_StC, dim=-1)
    best_SA, match_SA = _best_matches(unit_StC[:, ::2].contiguous(), unit_StC[:, 1::2].contiguous(), scores)
    num_b = num_tokens // 2
    num_stay = num_tokens - num_b - num_merged
    to_SA = match_SA + num_stay
    if num_stay:  # no sort otherwise: every even token is merged, whatever its score
        stay_S = best_SA.argsort(dim=1, descending=True, stable=True)[:, num_merged:]
        ranks = torch.arange(num_stay, device=to_SA.device).expand(num_segments, num_stay)
        to_SA.scatter_(1, stay_S, ranks)
    moves_St = to_SA.new_empty(num_segments, num_tokens)
    moves_St[:, ::2] = to_SA
    moves_St[:, 1::2] = torch.arange(num_stay, num_stay + num_b, device=to_SA.device)
    merged_StC = torch.zeros_like(metric_StC[:, : num_tokens - num_merged])
    merged_StC.scatter_add_(1, moves_St[..., None].expand_as(metric_StC), metric_StC)
    return moves_St, merged_StC


def _best_matches(unit_SAC: Tensor, unit_SBC: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """For each A token its highest cosine with any B token, and which one; the scores of a block of segments a time."""
    num_segments, num_a, _ = unit_SAC.shape
    num_b = unit_SBC.shape[1]
    best_SA = unit_SAC.new_empty(num_segments, num_a)
    match_SA = torch.empty_like(best_SA, dtype=torch.int64)
    block = max(scores.numel() // (num_a * num_b), 1)
    for start in range(0, num_segments, block):
        stop = min(start + block, num_segments)
        part_SAB = scores[: (stop - start) * num_a * num_b].view(stop - start, num_a, num_b)
        torch.bmm(unit_SAC[start:stop], unit_SBC[start:stop].mT, out=part_SAB)
        torch.max(part_SAB, dim=2, out=(best_SA[start:stop], match_SA[start:stop]))
    return best_SA, match_SA


def _scratch(num_segments: int, num_tokens: int, device: torch.device) -> Tensor:
    """Room for the scores of at least one segment, at most all."""
    one_segment = (num_tokens + 1) // 2 * (num_tokens // 2)
    limit = MAX_SCORES_CPU if device.type == "cpu" else MAX_SCORES_GPU
    return torch.empty(max(one_segment, min(limit, num_segments * one_segment)), device=device)


def _gather(
    tokens_STD: Tensor,
    sizes: Tensor | None,
    spans: Tensor,
    positions: Tensor | None,
    targets_ST: Tensor,
    num_kept: int,
) -> Merged:
    """Sum what was sent to the same place, weighted by size, and divide by the sum of sizes."""
    num_segments = len(tokens_STD)
    sizes_ST = torch.ones_like(targets_ST) if sizes is None else sizes.long()
    sizes_SK = sizes_ST.new_zeros(num_segments, num_kept).scatter_add_(1, targets_ST, sizes_ST)
    first_SK = spans.new_zeros(num_segments, num_kept).scatter_reduce(
        1, targets_ST, spans[..., 0], "amin", include_self=False
    )
    last_SK = spans.new_zeros(num_segments, num_kept).scatter_reduce(
        1, targets_ST, spans[..., 1], "amax", include_self=False
    )

    # one bag a kept token: reads each input once, sums in a fixed order, and is threaded on every device
    rows = torch.arange(num_segments, device=targets_ST.device)[:, None]
    bags = (targets_ST + rows * num_kept).flatten()
    order = bags.argsort(stable=True)
    bag_sizes = torch.zeros(num_segments * num_kept, dtype=torch.int64, device=bags.device)
    bag_sizes.scatter_add_(0, bags, torch.ones_like(bags))
    starts = bag_sizes.cumsum(0) - bag_sizes
    weights = None if sizes is None else sizes_ST.flatten()[order]

    def means(values_STx: Tensor) -> Tensor:
        """Of what was sent to the same place, [S, K, x]."""
        of_value = None if weights is None else weights.to(values_STx.dtype)
        sums = embedding_bag(order, values_STx.flatten(0, 1), starts, mode="sum", per_sample_weights=of_value)
        return sums.view(num_segments, num_kept, -1) / sizes_SK[..., None]

    return Merged(
        means(tokens_STD),
        sizes_SK,
        torch.stack([first_SK, last_SK], dim=-1).long(),
        None if positions is None else means(positions),
    )
