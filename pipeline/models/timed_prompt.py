"""Prompts of families that write times around a video's tokens: the words before the video and after it.

What stands around the video is split from it as text, and each part is tokenized by itself: between them stand marks,
at which tokenizers split anyway. White space ahead of the video goes with the video's own first words, as it would in
one text.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from longvlm.pipeline.models.contract import Prompt
from longvlm.pipeline.models.prompt import options_after, silent_ids
from longvlm.pipeline.models.thinking import closed, opens
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

NAME = "chat"  # of the one prompt template that such a checkpoint has
_PROBE = "What?"
_CACHED_TEXTS = 10_000


class TimedPrompt:
    """A tokenizer with the words around a video and a question.

    Args:
        model: its name.
        tokenizer: a fast tokenizer of transformers.
        split: a question to the text before the video, and the text after it.
        place: the token in whose places visual tokens go.
        marks: all tokens that mark such places; no question may hold one.
    """

    def __init__(
        self, model: str, tokenizer: Any, split: Callable[[str], tuple[str, str]], place: int, marks: frozenset[int]
    ) -> None:
        self.model, self.tokenizer, self.split, self.place, self.marks = model, tokenizer, split, place, marks
        self.encode = lru_cache(_CACHED_TEXTS)(self._encode)  # the same times come up again and again
        before, _ = split(_PROBE)
        self.gap = before[len(before.rstrip()) :]  # ahead of the video, which its own first words begin with

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids; no mark is added, since these templates write their own."""
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """See `LanguageModel.lay_out`."""
        if template != NAME:
            raise InputError(
                f"the model {self.model} has no prompt template {template!r}; it is asked with its own, {NAME}."
            )
        before_text, after_text = self.split(question)
        after_text = after_text if may_think else closed(after_text)
        before, after = self.encode(before_text.rstrip()), self.encode(after_text)
        if self.marks & {*before, *after}:
            marks = " or ".join(sorted(self.tokenizer.convert_ids_to_tokens(list(self.marks))))
            raise TerminalError(
                ErrorCode.ANSWER_FAILED, f"the question contains {marks}, which mark the video's place; take them out."
            )
        ids = (*before, *[self.place] * num_visual_tokens, *after)
        return Prompt(ids, len(before), num_visual_tokens, opens(after_text))

    def turn_ids(self, question: str, template: str) -> tuple[int, ...]:  # noqa: ARG002 - there are none
        """Its template lays out one question; InputError."""
        raise InputError(f"{self.model} is asked by its chat template, one question at a time; split the conversation.")

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of each option after the prompt: at once where that ends in white space, after a space otherwise.

        Raises:
            InputError: an option is empty, or its tokens run into those of the prompt.
        """
        return options_after(closed(self.split(_PROBE)[1]), options, lambda text: [*self.encode(text)])

    def decode(self, ids: Iterable[int]) -> str:
        """See `LanguageModel.decode`."""
        silent = silent_ids(self.tokenizer.backend_tokenizer)
        text: str = self.tokenizer.decode([i for i in ids if i not in silent], skip_special_tokens=False)
        return text.strip()

    @property
    def num_ids(self) -> int:
        """One more than the largest id that the tokenizer knows."""
        return max(self.tokenizer.get_vocab().values()) + 1
