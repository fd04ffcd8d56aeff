"""Qwen3-VL when answering: its language model over what its merger and deepstack mergers made of a video.

Before each run of tokens stands its time, as text: `<12.5 seconds>`. As long as nothing is merged a run is a pair of
frames, and prompts are transformers' own, token by token. Once tokens are merged a run is a segment, with the middle of
its time: texts for each pair would take about as many tokens as what is left of it.

Positions are three (M-RoPE): text counts on along all of them; a token stands at its run's time, at its row and at its
column, and the text after a run goes on behind the longer side of the grid (rule 1; transformers 5.23 has the same). A
merged token stands at the mean place of all that went into it, weighted by size.

Shape letters: N prefix rows, M rows with the text between them, D model width, L deepstack streams, B runs.
"""

# ruff: noqa: N806 - tensors are named by their shape

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longvlm.pipeline.models.contract import Extent, ModelSpec, VideoRows
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.qwen3_vl.checkpoint import QwenCheckpoint
from longvlm.pipeline.models.row_layout import TokenBlock, interleave, is_text, timed_runs
from longvlm.pipeline.models.timed_model import TimedModel
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.pipeline.transfer import to_device
from longvlm.schemas.recipe import Precision

_POSITION_RULE = 1  # where text goes on after a run of tokens; part of the fingerprint of the weights


@dataclass(frozen=True, eq=False)
class QwenModel(TimedModel):
    """A loaded Qwen3-VL, without its tower."""

    config: Any  # transformers' own, of the whole model

    def blocks(self, prefix: VideoPrefix) -> list[TokenBlock]:
        """See `time_blocks`."""
        return time_blocks(self.prompt, self.config, prefix)

    def num_text_rows(self, start_s: float, end_s: float) -> int:
        """Of the longer of its two times, and the marks."""
        texts = (f"{self.prompt.gap}{_time_text(time_s)}" for time_s in (start_s, end_s))
        return max(len(self.prompt.encode(text)) for text in texts) + 2

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """The merger's outputs as embeddings; the deepstack streams are added after the first blocks."""
        blocks, embed = self.blocks(prefix), self.llm.get_input_embeddings()
        rows_NC = self.on_device(prefix.rows)
        first_ND, *streams = torch.split(rows_NC, embed.weight.shape[1], dim=1)
        is_token_M = ~to_device(is_text(blocks), rows_NC.device)
        embeds_MD = interleave(first_ND, blocks, embed)
        added = [torch.zeros_like(embeds_MD).masked_scatter(is_token_M[:, None], stream) for stream in streams]
        positions_3M, num_positions = positions_of(prefix, blocks)
        return VideoRows(
            embeds_MD,
            to_device(positions_3M, rows_NC.device),
            num_positions,
            torch.stack(added) if added else None,
        )

    def extent(self, prefix: VideoPrefix) -> Extent:
        """A run takes as many positions as the longer side of the grid has tokens."""
        assert prefix.patch_grid is not None, "`blocks` has seen to it"
        blocks = self.blocks(prefix)
        num_positions = sum(len(block.before) + max(prefix.patch_grid) + len(block.after) for block in blocks)
        return Extent(sum(block.num_rows for block in blocks), num_positions)


def time_blocks(prompt: TimedPrompt, config: Any, prefix: VideoPrefix) -> list[TokenBlock]:
    """Each run of a video's tokens behind its time, between marks.

    Raises:
        ValueError: the prefix does not say when its tokens were seen.
    """
    gap, found = prompt.gap, []
    for run in timed_runs(prefix):
        before = (*prompt.encode(f"{gap}{_time_text(run.time_s)}"), config.vision_start_token_id)
        found.append(TokenBlock(run.num_tokens, before, (config.vision_end_token_id,)))
        gap = ""
    return found


def _time_text(time_s: float) -> str:
    return f"<{time_s:.1f} seconds>"


def positions_of(prefix: VideoPrefix, blocks: list[TokenBlock]) -> tuple[Tensor, int]:
    """Positions of a video's rows, float32 [3, M] of time, row and column, and how far they move on what follows.

    Args:
        prefix: whose tokens have places, on a grid.
        blocks: its runs.

    Raises:
        ValueError: it has none.
    """
    if prefix.positions is None or prefix.patch_grid is None:
        raise ValueError(f"nobody said where these tokens lie: {prefix}")
    parts, start, first = [], 0, 0
    for block in blocks:
        places_N3 = prefix.positions[first : first + block.num_tokens]
        before, after = torch.arange(len(block.before)), torch.arange(len(block.after))
        places_3N = pad(places_N3[:, 1:].T, (0, 0, 1, 0))  # time stands still within a run: its text says it
        tokens = start + len(before)
        end = tokens + max(prefix.patch_grid)
        parts += [(start + before).expand(3, -1), tokens + places_3N, (end + after).expand(3, -1)]
        start, first = end + len(after), first + block.num_tokens
    return torch.cat([part.float() for part in parts], dim=1), start


def describe_qwen(model: str) -> ModelSpec:
    """See `TimedCheckpoint.describe`."""
    return QwenCheckpoint.find(model).describe({"positions": _POSITION_RULE})


def load_qwen(model: str, precision: Precision = "float32", device: str = "cpu") -> QwenModel:
    """See `TimedCheckpoint.load`."""
    checkpoint = QwenCheckpoint.find(model)
    return QwenModel(**checkpoint.load(precision, device), config=checkpoint.config)
