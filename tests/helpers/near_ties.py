"""Merging by its definition, and its near-ties: rows that a noise of a millionth on the inputs changes.

Rounding decides there who joins whom, and whoever adds up in another order may decide otherwise there, and nowhere
else. So a row may differ from a reference's where the definition under noise does not always give the same row, and
all others are held to the reference. What is tested has no say in which rows those are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from longvlm.schemas.recipe import METRIC_HEADS, tokens_after

NOISE = 1e-6  # standard deviation, in shares of a segment's largest input
NUM_DRAWS = 16
MOVED = 10 * NOISE  # in the same shares: further than noise moves a row whose members stay the same


def plain_merge(
    tokens: torch.Tensor, schedule: Sequence[int], heads: int = METRIC_HEADS
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One segment's tokens [K, D] and sizes [K] by the definition (LONGVLM.md, section 4), in float64.

    The metric is taken anew from the wide tokens at each step. With them comes how near to a tie any choice was.
    """
    tokens, sizes, nearest = tokens.double(), torch.ones(len(tokens)).double(), float("inf")
    for step in schedule:
        metric = tokens.view(len(tokens), heads, -1).mean(dim=1)
        unit = metric / metric.norm(dim=1, keepdim=True)
        evens, odds = torch.arange(0, len(tokens), 2), torch.arange(1, len(tokens), 2)
        num_merged = min(step, len(odds))
        if num_merged < 1:
            continue
        best, match = (scores := unit[evens] @ unit[odds].T).max(dim=1)
        ranked, order = best.sort(descending=True, stable=True)
        gaps = [ranked[:-1] - ranked[1:], -scores.topk(min(2, len(odds)), dim=1).values.diff(dim=1).flatten()]
        nearest = min([nearest, *torch.cat(gaps).tolist()])
        merged, kept = order[:num_merged], order[num_merged:]
        places = torch.empty(len(tokens), dtype=torch.int64)
        places[evens[kept]] = torch.arange(len(kept))
        places[odds] = len(kept) + torch.arange(len(odds))
        places[evens[merged]] = places[odds[match[merged]]]
        sums = torch.zeros(len(tokens) - num_merged, tokens.shape[1]).double()
        sums.index_add_(0, places, tokens * sizes[:, None])
        sizes = torch.zeros(len(sums)).double().index_add_(0, places, sizes)
        tokens = sums / sizes[:, None]
    return tokens, sizes.long(), nearest


@dataclass(frozen=True, eq=False)
class Merging:
    """Tokens [S, T, D] and how they are merged into [S, K], as the definition has it, to be done again under noise.

    Attributes:
        inputs: the tokens before.
        schedule: of `merge`.
        heads: of `merge`.
    """

    inputs: torch.Tensor
    schedule: Sequence[int]
    heads: int = METRIC_HEADS
    _unstable: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """S and K."""
        schedule = tuple(max(step, 0) for step in self.schedule)
        return len(self.inputs), tokens_after(self.inputs.shape[1], schedule)

    def unstable(self, segment: int) -> torch.Tensor:
        """Which rows [K] of a segment the definition gives otherwise under any of `NUM_DRAWS` draws of noise."""
        if segment not in self._unstable:
            tokens = self.inputs[segment].detach().cpu().double()
            largest = float(tokens.abs().max())
            calm, sizes, _ = plain_merge(tokens, self.schedule, self.heads)
            generator, found = torch.Generator().manual_seed(segment), torch.zeros(len(calm), dtype=torch.bool)
            for _ in range(NUM_DRAWS):
                noise = NOISE * largest * torch.randn(tokens.shape, generator=generator)
                noisy, noisy_sizes, _ = plain_merge(tokens + noise, self.schedule, self.heads)
                found |= (noisy_sizes != sizes) | ((noisy - calm).abs().amax(dim=1) > MOVED * largest)
            self._unstable[segment] = found
        return self._unstable[segment]

    def settled(self, differs: torch.Tensor) -> torch.Tensor:
        """Which rows [S, K] to hold to a reference: all but the near-ties among those that differ from it.

        Args:
            differs: [S, K], which rows do.

        Raises:
            AssertionError: those are less than half of the rows.
        """
        settled = torch.ones(self.shape, dtype=torch.bool)
        for segment in differs.any(dim=1).nonzero().flatten().tolist():  # segments are merged apart from each other
            settled[segment] = ~(differs[segment] & self.unstable(segment))
        num_apart, num_rows = int((~settled).sum()), settled.numel()
        assert 2 * num_apart <= num_rows, f"{num_apart} of {num_rows} rows differ as near-ties: too many"
        return settled

    def hold(self, agree: Callable[..., None], found, wanted, atol: float = 0.0, rtol: float = 0.0) -> None:
        """Hold any quantity of the rows to a reference's, but for near-ties.

        Args:
            agree: the fixture, which fails for what differs elsewhere.
            found: ours, [S, K, ...] or with segments and rows in one dimension.
            wanted: the reference's, in the same shape.
            atol: absolute tolerance; none by default.
            rtol: relative tolerance; none by default.
        """
        found, wanted = (torch.as_tensor(values).detach().cpu() for values in (found, wanted))
        assert found.shape == wanted.shape
        num_segments, num_kept = self.shape
        found, wanted = (values.reshape(num_segments * num_kept, -1) for values in (found, wanted.to(found.dtype)))
        is_close = torch.isclose(found, wanted, atol=atol, rtol=rtol).all(dim=1)
        settled = self.settled(~is_close.view(self.shape)).flatten()
        agree(found[settled], wanted[settled], atol=atol, rtol=rtol)
