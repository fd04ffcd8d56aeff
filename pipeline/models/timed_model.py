"""Models whose input stored tokens are as they are, between texts that say when they were seen.

Shape letters: N prefix rows, M rows with the text between them, D model width.
"""

# ruff: noqa: N803 - tensors are named by their shape

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.models.contract import Extent, Prompt, VideoRows, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.row_layout import TokenBlock, fold, interleave
from longvlm.pipeline.models.timed_prompt import NAME, TimedPrompt
from longvlm.pipeline.transfer import to_device
from longvlm.schemas.errors import InputError


@dataclass(frozen=True, eq=False)
class TimedModel(ABC):
    """A loaded model, ready to read prefixes and to be decoded from."""

    name: str
    llm: Any  # a causal language model of transformers
    prompt: TimedPrompt
    eos_ids: tuple[int, ...]
    mm_hidden_size: int  # width of a stored token

    projector = None  # it stands before what is stored
    templates = (NAME,)
    mark_ids = ()
    option_temperature = 1.0  # none that is known

    @abstractmethod
    def blocks(self, prefix: VideoPrefix) -> list[TokenBlock]:
        """How a video's tokens lie among its texts; ValueError where the prefix does not say when they were seen."""

    @abstractmethod
    def num_text_rows(self, start_s: float, end_s: float) -> int:
        """See `LanguageModel.num_text_rows`."""

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return int(self.llm.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = self.llm.lm_head.weight.device
        return device

    @property
    def vocabulary(self) -> Vocabulary:
        """What its answers are spelt in."""
        return Vocabulary(self.prompt.tokenizer.backend_tokenizer, self.eos_ids)

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Placeholders, and rows of the head that no token belongs to."""
        return (*sorted(self.prompt.marks), *range(self.prompt.num_ids, self.llm.config.vocab_size))

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """A video's tokens as they are, with the texts around them."""
        embed = self.llm.get_input_embeddings()
        return VideoRows(interleave(self.on_device(prefix.rows), self.blocks(prefix), embed))

    def on_device(self, rows_NC: Tensor) -> Tensor:
        """Stored rows in the model's precision, where it lies."""
        weight = self.llm.get_input_embeddings().weight
        return to_device(rows_NC, weight.device).to(weight.dtype)

    def extent(self, prefix: VideoPrefix) -> Extent:
        """Tokens and texts, each at a position of its own."""
        num_rows = sum(block.num_rows for block in self.blocks(prefix))
        return Extent(num_rows, num_rows)

    def fold(self, seen_M: Tensor, prefix: VideoPrefix) -> Tensor:
        """What a block's text drew is shared equally among its tokens."""
        return fold(seen_M, self.blocks(prefix))

    def caption_row(self, prefix: VideoPrefix, at_s: float) -> int:  # noqa: ARG002 - there are none
        """Its texts stand before the tokens, where nothing of them can be learnt; InputError."""
        raise InputError("it is a timed caption, and prompts of this model have no time markers to learn it at.")

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """See `TimedPrompt.lay_out`."""
        return self.prompt.lay_out(question, num_visual_tokens, template, may_think=may_think)

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:
        """See `TimedPrompt.turn_ids`."""
        return self.prompt.turn_ids(question, template)

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """See `TimedPrompt.option_ids`."""
        return self.prompt.option_ids(options)

    def decode(self, ids: Iterable[int]) -> str:
        """See `TimedPrompt.decode`."""
        return self.prompt.decode(ids)
