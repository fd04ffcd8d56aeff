"""How the rows of a video lie in a prompt: runs of its tokens, and the text that belongs to each run.

LongVLM may put a time marker after a segment's rows; other families write a time before them, and a mark after. Rows of
such text are rows of the video: they count as visual tokens, and what an answer attends to in them is their run's.

Shape letters: N prefix rows, M rows with the text between them, D model width, B blocks.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.transfer import tensor_on, to_device


@dataclass(frozen=True)
class TokenBlock:
    """A run of a video's tokens, with the ids of the text before and after them."""

    num_tokens: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Tokens and text."""
        return len(self.before) + self.num_tokens + len(self.after)


@dataclass(frozen=True)
class TimedRun:
    """A run of tokens that one time stands for: a segment's, or of a video of which nothing was merged a picture's."""

    num_tokens: int
    time_s: float  # the middle of the segment, or when the picture was shown


def timed_runs(prefix: VideoPrefix) -> list[TimedRun]:
    """A video's tokens as runs: a picture each as long as nothing is merged, a segment each otherwise.

    Raises:
        ValueError: nobody said when segments were, or where tokens lie.
    """
    times, positions_N3 = prefix.times, prefix.positions
    if times is None or positions_N3 is None or prefix.patch_grid is None or times.num_global:
        raise ValueError(f"the prompts of this model say when tokens were seen, and nobody did: {prefix}")
    if prefix.num_whole_frames is None:
        middles_s = ((start_s + end_s) / 2 for start_s, end_s in zip(times.starts_s, times.ends_s, strict=True))
        return [TimedRun(count, middle_s) for count, middle_s in zip(times.counts, middles_s, strict=True)]
    num_patches = prefix.patch_grid[0] * prefix.patch_grid[1]
    return [TimedRun(num_patches, time_s) for time_s in positions_N3[::num_patches, 0].tolist()]


def interleave(rows_ND: Tensor, blocks: Sequence[TokenBlock], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows with each block's text around its own, [M, D].

    Args:
        rows_ND: what the blocks' tokens are, in order.
        blocks: of the video.
        embed: the language model's embedding.
    """
    ids_T = tensor_on(rows_ND.device, [token for block in blocks for token in (*block.before, *block.after)])
    is_text_M = to_device(is_text(blocks), rows_ND.device)
    rows_MD = rows_ND.new_empty(len(is_text_M), rows_ND.shape[1])
    rows_MD = rows_MD.masked_scatter(is_text_M[:, None], embed(ids_T).to(rows_ND.dtype))
    return rows_MD.masked_scatter(~is_text_M[:, None], rows_ND)


def fold(seen_M: Tensor, blocks: Sequence[TokenBlock]) -> Tensor:
    """Attention to rows with text as attention to the rows alone, [N].

    What a block's text drew is shared equally among its tokens; what the text of one without tokens drew is dropped.
    """
    device = seen_M.device
    is_text_M = to_device(is_text(blocks), device)
    counts_B = tensor_on(device, [block.num_tokens for block in blocks])
    of_block_M = torch.arange(len(blocks), device=device).repeat_interleave(
        tensor_on(device, [block.num_rows for block in blocks])
    )
    drawn_B = seen_M.new_zeros(len(blocks)).index_add_(0, of_block_M[is_text_M], seen_M[is_text_M])
    return seen_M[~is_text_M] + (drawn_B / counts_B.clamp(min=1)).repeat_interleave(counts_B)


def is_text(blocks: Sequence[TokenBlock]) -> Tensor:
    """Which of the M rows are text, bool [M]."""
    kinds = torch.tensor([True, False, True] * len(blocks))
    lengths = [length for block in blocks for length in (len(block.before), block.num_tokens, len(block.after))]
    return kinds.repeat_interleave(torch.tensor(lengths))


def text_and_places(blocks: Sequence[TokenBlock], place: int) -> tuple[int, ...]:
    """The ids of a video in a prompt, [M]: those of its text, and `place` wherever a token goes."""
    return tuple(token for block in blocks for token in (*block.before, *[place] * block.num_tokens, *block.after))
