"""Prompts by a checkpoint's own chat template, tokenized as transformers' processors do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longvlm.pipeline.chat_templates import ChatTemplateError, render
from longvlm.pipeline.model_folder import load_tokenizer
from longvlm.pipeline.models.checkpoints import chat_template
from longvlm.pipeline.models.contract import Prompt
from longvlm.pipeline.models.prompt import options_after, silent_ids
from longvlm.pipeline.models.thinking import closed, opens
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

NAME = "chat"  # of the one prompt template that such a checkpoint has
_PROBE = "What?"


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer with the template of one user's turn: the video, then the question.

    `load_chat_template` makes one.
    """

    model: str
    tokenizer: Any  # a fast tokenizer of transformers
    template: str  # Jinja
    modality: Literal["image", "video"]  # what the model's template calls what it looks at
    place: int  # the token in whose places visual tokens go
    marks: frozenset[int]  # all tokens that mark such places: no question may hold one

    def text(self, question: str) -> str:
        """The prompt up to where the answer begins, with one placeholder for the whole video.

        Raises:
            TerminalError: ANSWER_FAILED, the template cannot be filled with this question.
        """
        content = [{"type": self.modality}, {"type": "text", "text": question}]
        try:
            return render(self.template, [{"role": "user", "content": content}], self.tokenizer.special_tokens_map)
        except ChatTemplateError as error:
            raise TerminalError(
                ErrorCode.ANSWER_FAILED, f"the model's chat template cannot be filled with the question ({error})."
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids; a begin mark is added unless the template wrote one, as `ProcessorMixin.apply_chat_template`."""
        bos = self.tokenizer.bos_token
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=not (bos and text.startswith(bos)), verbose=False
        ).input_ids
        return ids

    def lay_out(self, question: str, num_visual_tokens: int, template: str, *, may_think: bool = False) -> Prompt:
        """The prompt as ids. Placeholders are ids of their own, so the one is repeated after tokenizing, not before.

        Raises:
            InputError: `template` is not the one there is.
            TerminalError: ANSWER_FAILED if the question itself holds a token that marks a video's or image's place, or
                the template cannot be filled with it.
        """
        if template != NAME:
            raise InputError(
                f"the model {self.model} has no prompt template {template!r}; it is asked with its own, {NAME}."
            )
        text = self.text(question) if may_think else closed(self.text(question))
        ids = self.encode(text)
        found = [i for i, token in enumerate(ids) if token in self.marks]
        if len(found) != 1:
            marks = " or ".join(sorted(self.tokenizer.convert_ids_to_tokens(list(self.marks))))
            raise TerminalError(
                ErrorCode.ANSWER_FAILED, f"the question contains {marks}, which mark the video's place; take them out."
            )
        first = found[0]
        ids = [*ids[:first], *[self.place] * num_visual_tokens, *ids[first + 1 :]]
        return Prompt(tuple(ids), first, num_visual_tokens, opens(text))

    def option_ids(self, options: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of each option after the prompt: at once where that ends in white space, after a space otherwise.

        Raises:
            InputError: an option is empty, or its tokens run into those of the prompt.
        """
        return options_after(closed(self.text(_PROBE)), options, self.encode)

    def decode(self, ids: Iterable[int]) -> str:
        """See `LanguageModel.decode`."""
        silent = silent_ids(self.tokenizer.backend_tokenizer)
        text: str = self.tokenizer.decode([i for i in ids if i not in silent], skip_special_tokens=False)
        return text.strip()

    @property
    def num_ids(self) -> int:
        """One more than the largest id that the tokenizer knows."""
        return max(self.tokenizer.get_vocab().values()) + 1


def load_chat_template(
    model: str, folder: Path, modality: Literal["image", "video"], place: int, marks: frozenset[int]
) -> ChatTemplate:
    """The tokenizer and chat template of a checkpoint.

    Raises:
        InputError: either is missing or damaged, or the template has no single place for a video.
    """
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer of {model} has no fast form; save it as tokenizer.json with transformers.")
    chat = ChatTemplate(model, tokenizer, chat_template(model, folder, tokenizer), modality, place, marks)
    try:
        ids = chat.encode(chat.text(_PROBE))
    except TerminalError as error:
        raise InputError(
            f"the chat template of {model} cannot be filled with one {modality} and a question ({error.__cause__}); "
            "take the one that comes with the checkpoint."
        ) from error
    if [token for token in ids if token in marks] != [place]:
        raise InputError(
            f"the chat template of {model} has no single place for the {modality} that its tokenizer and config.json "
            "agree on; take the files that come with the checkpoint."
        )
    return chat
