"""What the engine is given and what it gives: questions about a video in, answers out."""

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvlm.schemas.errors import TerminalError

if TYPE_CHECKING:
    from torch import Tensor

    from longvlm.pipeline.models.prefix import VideoPrefix


@dataclass(frozen=True, eq=False)
class Request:
    """A question about a group's video."""

    key: Hashable  # what its answer will be known by
    question: str
    options: tuple[str, ...] = ()  # if any, the answer is the likeliest of them, and nothing is decoded
    grammar: str | None = None  # of llguidance: what the text of the answer has to be
    max_new_tokens: int | None = None  # where its answer is short by nature; the recipe's limit holds as well

    @property
    def is_free(self) -> bool:
        """Whether its answer is held to nothing, so that a model may think before it."""
        return not self.options and self.grammar is None


@dataclass(frozen=True, eq=False)
class Group:
    """A video and what is asked about it."""

    prefix: VideoPrefix
    requests: Sequence[Request]


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of a request: a text, or the error that stands in its row. Counts are of what was reached."""

    key: Hashable
    text: str | None = None  # without what was thought on the way to it
    shares: tuple[float, ...] = ()  # with options: each one's share of their likelihood
    thinking: str | None = None  # that; of an answer that was cut off within it, what there was
    num_visual_tokens: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0  # the end mark counted; 0 with options
    latency_ms: float = 0.0  # from the moment it got a place in the batch
    attention: Tensor | None = None  # [N] float32: from what made the answer's tokens to each row of the prefix
    error: TerminalError | None = None

    @property
    def confidence(self) -> float | None:
        """With options: the share of the chosen one."""
        return max(self.shares, default=None)


@dataclass
class Stats:
    """What the engine did, and how long it took."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_steps: int = 0
