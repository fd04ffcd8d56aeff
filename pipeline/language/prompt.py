"""The one place that lays out a prompt, and the one that turns a model's words back into an answer."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from schemas.errors import ErrorCode, InputError, TerminalError

PATCH, START, END = "<vid_patch>", "<vid_start>", "<vid_end>"
VIDEO_TOKENS = (PATCH, START, END)  # the order in which they are added to a vocabulary (LONGVLM.md section 1)


@dataclass(frozen=True)
class Template:
    """A conversation's words: one system text, one turn of the user, and the cue for the answer."""

    system: str
    user: str
    assistant: str
    separator: str
    end: str  # what closes an answer

    def render(self, message: str) -> str:
        """The prompt up to where the answer begins; no space follows the cue."""
        turns = (self.system, f"{self.user}: {message}", f"{self.assistant}:")
        return self.separator.join(turns)


TEMPLATES = {
    "long_vlm_v1": Template(  # LONGVLM.md section 6; the missing space before "Follow" is the reference's
        system="You are LongVLM, a large vision-language assistant. You are able to understand the video content that "
        "the user provides, and assist the user with a variety of tasks using natural language."
        "Follow the instructions carefully and explain your answers in detail based on the provided video.",
        user="USER",
        assistant="ASSISTANT",
        separator=" ",
        end="</s>",
    )
}


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


def tidy(text: str, name: str = "long_vlm_v1") -> str:
    """A decoded answer without surrounding white space and closing marks.

    The reference strips any of the characters `<`, `/`, `s`, `>` from the end, so that "two dogs" lost its s
    (LONGVLM.md section 9); here only the whole mark goes.
    """
    end = template(name).end
    text = text.strip()
    while text.endswith(end):
        text = text.removesuffix(end).rstrip()
    return text
