"""What a language model with eyes is to the rest: facts for stores and recipes, and what the engine asks of one.

Shape letters: M rows of a prefix after projection, D model width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from longvlm.pipeline.models.prefix import Sight, VideoPrefix


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a model's answers are spelt in."""

    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]  # tokens that end an answer


@dataclass(frozen=True)
class ModelSpec:
    """What a model is, as far as stores and recipes care."""

    name: str  # folder or hub id, as the user named it
    sight: Sight
    weights: str  # fingerprint of all that decides its answers: equal for equal weights, however they are stored
    mm_hidden_size: int  # width of a visual token: the projector's input
    context: int  # longest prompt and answer, in tokens
    templates: tuple[str, ...]  # prompt templates it can be asked with, the default first
    family: str  # longvlm | llava | llava_next_video | llava_onevision
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and where in them the video's rows go."""

    ids: tuple[int, ...]
    first_patch: int
    num_patches: int

    def __post_init__(self) -> None:
        """The patches lie inside the prompt."""
        if self.num_patches < 1 or not 0 <= self.first_patch <= len(self.ids) - self.num_patches:
            raise ValueError(f"{self.num_patches} patches at {self.first_patch} do not fit {len(self.ids)} tokens")


class LanguageModel(Protocol):
    """A loaded model as the engine uses it."""

    @property
    def name(self) -> str:
        """Folder or hub id."""

    @property
    def llm(self) -> Any:
        """A causal language model of transformers."""

    @property
    def projector(self) -> Any:
        """The module that visual tokens go through."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""

    @property
    def mm_hidden_size(self) -> int:
        """Width of a visual token before projection."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates it can be asked with, the default first."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What its answers are spelt in."""

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Rows of the head that were never trained: never to be emitted."""

    @property
    def option_temperature(self) -> float:
        """What log-likelihoods of options are divided by before they become shares; 1 where nobody has calibrated."""

    def project(self, prefix: VideoPrefix) -> Tensor:
        """A video's rows as the language model reads them, [M, D] in its precision, on its device.

        Families that pool a frame's patch grid do so where no patch was merged: merged tokens lie on no grid.

        Raises:
            ValueError: its prompts say when segments began, and the prefix does not.
        """

    def count_rows(self, prefix: VideoPrefix) -> int:
        """M: how many rows `project` makes of a prefix."""

    def marker_ids(self, start_s: float) -> tuple[int, ...]:
        """The tokens that stand after the rows of a segment that began then; none where prompts have no markers."""

    def lay_out(self, question: str, num_visual_tokens: int, template: str) -> Prompt:
        """The prompt of a question about `num_visual_tokens` rows (M above).

        Raises:
            InputError: the model lacks the template.
            TerminalError: ANSWER_FAILED if the question itself contains a token that marks the video's place.
        """

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:
        """The ids of a further question about the same video, after an answer and the first of `eos_ids`.

        Raises:
            InputError: the model is only ever asked one question at a time.
        """

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids that each option has as an answer: as a continuation of any prompt of `lay_out`.

        Raises:
            InputError: an option is empty, or its tokens run into those of the prompt.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The answer that some token ids spell, without marks and surrounding white space."""
