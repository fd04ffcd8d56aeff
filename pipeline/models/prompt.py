"""The one place that lays out a prompt, and the one that turns a model's words back into an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer

from longvlm.pipeline.models.contract import Prompt
from longvlm.pipeline.models.thinking import MARKS
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError

PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"
VIDEO_TOKENS = (PATCH, START, END)  # the order in which they are added to a vocabulary (LONGVLM.md section 1)
CLOSING_MARK = "</s>"  # closes an answer, in every template
MAX_MARKER_TOKENS = 9  # of a time such as 10:02:03, a token a character and one for the space before it
PromptLayout = Literal["plain", "time_markers"]  # what else stands among a video's rows: nothing, or markers of time


@dataclass(frozen=True)
class Template:
    """A conversation's words: one system text, one turn of the user, and the cue for the answer."""

    system: str
    user: str
    assistant: str
    separator: str

    @property
    def cue(self) -> str:
        """What an answer follows, after a space."""
        return f"{self.assistant}:"

    def render(self, message: str) -> str:
        """The prompt up to where the answer begins; no space follows the cue."""
        return self.separator.join((self.system, self.turn(message)))

    def turn(self, message: str) -> str:
        """A user's turn and the cue: what follows the system text, or the mark that closed the answer before."""
        return self.separator.join((f"{self.user}: {message}", self.cue))


TEMPLATES = {
    "long_vlm_v1": Template(  # LONGVLM.md section 6; the missing space before "Follow" is the reference's
        system="You are LongVLM, a large vision-language assistant. You are able to understand the video content that "
        "the user provides, and assist the user with a variety of tasks using natural language."
        "Follow the instructions carefully and explain your answers in detail based on the provided video.",
        user="USER",
        assistant="ASSISTANT",
        separator=" ",
    ),
    "brief": Template(  # for small models, which learn nothing from a long system text and pay for it with each prompt
        system="Answer questions about the video.",
        user="USER",
        assistant="ASSISTANT",
        separator=" ",
    ),
    "vicuna_v1": Template(  # LONGVLM.md section 7: the reference's training, whatever the model is asked with later
        system="A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
        user="USER",
        assistant="ASSISTANT",
        separator=" ",
    ),
}


def template(name: str) -> Template:
    """A template by name; InputError if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"the prompt template {name!r} is not known; use one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def render(question: str, num_patches: int, *, use_start_end: bool = True, name: str = "long_vlm_v1") -> str:
    """The prompt as text: the video's placeholders, a line break, the question verbatim (LONGVLM.md section 6)."""
    video = PATCH * num_patches
    if use_start_end:
        video = START + video + END
    return template(name).render(f"{video}\n{question}")


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour; whole seconds, rounded down."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def marker_ids(tokenizer: Tokenizer, start_s: float) -> tuple[int, ...]:
    """A time marker as ids: when a segment began, as text such as 0:08, without the tokenizer's begin mark."""
    return tuple(tokenizer.encode(clock(start_s), add_special_tokens=False).ids)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer must know."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer does not know {token}; get it from load_tokenizer")
    return found


def lay_out(tokenizer: Tokenizer, question: str, num_patches: int, *, use_start_end: bool, name: str) -> Prompt:
    """The prompt as ids, its video placeholders found and counted.

    Raises:
        TerminalError: ANSWER_FAILED if the question itself contains one of the video tokens.
    """
    ids = tokenizer.encode(render(question, num_patches, use_start_end=use_start_end, name=name)).ids
    patch, start, end = (token_id(tokenizer, token) for token in VIDEO_TOKENS)
    marks = [i for i, token in enumerate(ids) if token in (patch, start, end)]
    first = marks[0]
    expected = [patch] * num_patches
    if use_start_end:
        expected = [start, *expected, end]
    if len(marks) != len(expected) or ids[first : first + len(expected)] != expected:
        raise TerminalError(
            ErrorCode.ANSWER_FAILED,
            f"the question contains {' or '.join(VIDEO_TOKENS)}, which mark the video's place; take them out.",
        )
    return Prompt(tuple(ids), first + use_start_end, num_patches)


def turn_ids(tokenizer: Tokenizer, question: str, name: str) -> tuple[int, ...]:
    """The ids of a further question about the same video, after the mark that closes an answer: as in one text."""
    return tuple(tokenizer.encode(template(name).turn(question), add_special_tokens=False).ids)


def option_ids(tokenizer: Tokenizer, options: Sequence[str]) -> list[tuple[int, ...]]:
    """The ids of each option as an answer: what it adds to the cue (of all templates) after a space, as in training.

    Raises:
        InputError: an option is empty, or its tokens run into those of the cue.
    """
    cue = template("long_vlm_v1").cue
    return [continuation(cue, f"{cue} {option}", lambda text: tokenizer.encode(text).ids) for option in options]


def continuation(cue: str, whole: str, encode: Callable[[str], list[int]]) -> tuple[int, ...]:
    """The ids that a text has beyond those of the cue which it begins with.

    Raises:
        InputError: it has none, or the cue has other ids before it than alone.
    """
    before, ids = encode(cue), encode(whole)
    if len(ids) <= len(before) or ids[: len(before)] != before:
        option = whole.removeprefix(cue).strip()
        raise InputError(f"the option {option!r} has no tokens of its own as an answer; word it differently.")
    return tuple(ids[len(before) :])


def options_after(cue: str, options: Sequence[str], encode: Callable[[str], list[int]]) -> list[tuple[int, ...]]:
    """The ids of each option after a cue: at once where that ends in white space, after a space otherwise.

    Raises:
        InputError: an option is empty, or its tokens run into those of the cue.
    """
    space = "" if cue[-1:].isspace() else " "
    return [continuation(cue, f"{cue}{space}{option}", encode) for option in options]


def silent_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that stand for no text in an answer: special ones, but for the marks of thinking, which have to be found."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special and token.content not in MARKS)


def tidy(text: str) -> str:
    """A decoded answer without surrounding white space and closing marks.

    The reference strips any of the characters `<`, `/`, `s`, `>` from the end, so that "two dogs" lost its s
    (LONGVLM.md section 9); here only the whole mark goes.
    """
    text = text.strip()
    while text.endswith(CLOSING_MARK):
        text = text.removesuffix(CLOSING_MARK).rstrip()
    return text
