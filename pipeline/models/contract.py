"""What a language model with eyes is to the rest: facts for stores and recipes, and what the engine asks of one.

Shape letters: N rows of a prefix, M rows of a prompt that a video becomes, D model width, L blocks.
"""

# ruff: noqa: N803 - tensors are named by their shape

from __future__ import annotations  # torch, which takes seconds to load, stands in annotations alone

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer

from longvlm.pipeline.models.sight import Sight
from longvlm.schemas.tower import TowerSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from longvlm.pipeline.models.prefix import VideoPrefix


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
    family: str  # its config's model type, or what stands for it: something to tell, not to branch on
    vocabulary: Vocabulary
    asked_decoding: Mapping[str, float] = field(default_factory=dict)  # by its generation_config.json, if not greedy
    has_projector: bool = True  # whether stored tokens pass through one, which may be trained


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and where in them the video's rows go."""

    ids: tuple[int, ...]
    first_patch: int
    num_patches: int
    is_thinking: bool = False  # it ends within thinking, which an answer begins with

    def __post_init__(self) -> None:
        """The patches lie inside the prompt."""
        if self.num_patches < 1 or not 0 <= self.first_patch <= len(self.ids) - self.num_patches:
            raise ValueError(f"{self.num_patches} patches at {self.first_patch} do not fit {len(self.ids)} tokens")


def no_projector(model: str) -> str:
    """The sentence about a projector that should be trained and that there is none of."""
    return (
        f"the tokens stored for {model} are its language model's input as they are, so there is no projector to train "
        "or to whiten for; train with the stage lora or full, and without whiten."
    )


@dataclass(frozen=True, eq=False)
class VideoRows:
    """A video as the blocks of a language model are given it."""

    embeds: Tensor  # [M, D]
    positions: Tensor | None = None  # [3, M] of time, row and column, from the video's first row on; None: 0, 1, 2, ...
    num_positions: int = 0  # how far these move on what follows, see `Extent`
    added: Tensor | None = None  # [L, M, D]: what is added to the hidden states after each of the first L blocks


@dataclass(frozen=True)
class Extent:
    """How much of a prompt a video takes up."""

    num_rows: int  # M
    num_positions: int  # how far the positions of what follows move on: M too, but where rows share positions


class LanguageModel(Protocol):
    """A loaded model as the engine uses it."""

    @property
    def name(self) -> str:
        """Folder or hub id."""

    @property
    def llm(self) -> Any:
        """A causal language model of transformers."""

    @property
    def projector(self) -> nn.Module | None:
        """The module that stored tokens go through; None where they are the language model's input as they are."""

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
    def mark_ids(self) -> tuple[int, ...]:
        """Tokens around a video that came into the vocabulary with the projector, and are learnt along with it."""

    @property
    def option_temperature(self) -> float:
        """What log-likelihoods of options are divided by before they become shares; 1 where nobody has calibrated."""

    def read(self, prefix: VideoPrefix) -> VideoRows:
        """A video as the language model is given it, in its precision, on its device.

        Families that pool a frame's patch grid do so where no patch was merged: merged tokens lie on no grid.

        Raises:
            ValueError: its prompts say when tokens were seen, and the prefix does not.
        """

    def extent(self, prefix: VideoPrefix) -> Extent:
        """How much of a prompt `read` makes of a prefix."""

    def fold(self, seen_M: Tensor, prefix: VideoPrefix) -> Tensor:
        """Attention to the M rows of `read` as attention to the prefix rows that they come from, [N]."""

    def num_text_rows(self, start_s: float, end_s: float) -> int:
        """How many rows of text stand beside the tokens of a segment of that time, at most."""

    def caption_row(self, prefix: VideoPrefix, at_s: float) -> int:
        """The row of `read` at which a timed caption is learnt: the last of the marker of the segment shown then.

        Raises:
            InputError: its prompts have no time markers.
        """

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """The prompt of a question about `num_visual_tokens` rows (M above).

        Args:
            question: what is asked.
            num_visual_tokens: places for the video.
            template: one of `templates`.
            may_think: leave thinking open where the template opens it; else it is closed before the answer begins.

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
        """The ids that each option has as an answer: as a continuation of any prompt of `lay_out` without thinking.

        Raises:
            InputError: an option is empty, or its tokens run into those of the prompt.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """What some token ids spell, without surrounding white space and marks, but for those of thinking."""


class Words(Protocol):
    """How a model is asked, and what its ids say: the part of a LanguageModel that needs no weights."""

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """See `LanguageModel.lay_out`."""

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """See `LanguageModel.option_ids`."""

    def decode(self, ids: Iterable[int]) -> str:
        """See `LanguageModel.decode`."""


@dataclass(frozen=True, eq=False)
class View:
    """A video as a model of transformers is shown it."""

    ids: tuple[int, ...]  # M: what stands in the video's place in a prompt
    inputs: Callable[[Tensor, int], dict[str, Tensor]]  # ids [T] and where the video begins -> what `forward` takes

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.ids)


class WholeModel(Protocol):
    """A model as transformers loads and runs it as a whole: its own tower over frames."""

    @property
    def llm(self) -> Any:
        """The model, with `forward` and `generate`."""

    @property
    def words(self) -> Words:
        """How it is asked."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What its answers are spelt in."""

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Never to be emitted."""

    def most_pictures(self, num_rows: int, tower: TowerSpec) -> int:
        """How many pictures of a tower so many rows of a prompt hold; 0 if not even one."""

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """Show it the frames of some pictures, uint8 [F, height, width, 3] on the CPU.

        Args:
            frames: it looks at them again with every question.
            prefix: of the same pictures, with nothing merged: what it says of times stands in the prompt.
        """
