"""The one place that lays out a prompt, and the one that turns a model's words back into an answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from pipeline.language.model import Prompt
from schemas.errors import ErrorCode, InputError, TerminalError

PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"
VIDEO_TOKENS = (PATCH, START, END)  # the order in which they are added to a vocabulary (LONGVLM.md section 1)
CLOSING_MARK = "</s>"  # closes an answer, in every template


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
        turns = (self.system, f"{self.user}: {message}", self.cue)
        return self.separator.join(turns)


TEMPLATES = {
    "long_vlm_v1": Template(  # LONGVLM.md section 6; the missing space before "Follow" is the reference's
        system="You are LongVLM, a large vision-language assistant. You are able to understand the video content that "
        "the user provides, and assist the user with a variety of tasks using natural language."
        "Follow the instructions carefully and explain your answers in detail based on the provided video.",
        user="USER",
        assistant="ASSISTANT",
        separator=" ",
    )
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


def tidy(text: str) -> str:
    """A decoded answer without surrounding white space and closing marks.

    The reference strips any of the characters `<`, `/`, `s`, `>` from the end, so that "two dogs" lost its s
    (LONGVLM.md section 9); here only the whole mark goes.
    """
    text = text.strip()
    while text.endswith(CLOSING_MARK):
        text = text.removesuffix(CLOSING_MARK).rstrip()
    return text
