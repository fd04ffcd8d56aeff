"""Thinking: what a model writes between `<think>` and `</think>` on the way to its answer, and not to whoever asked.

Either the chat template's cue opens it, so that an answer begins within, or the model opens it itself. It goes on for
as long as the model likes: where an answer is held to options or a grammar, thinking that the cue has opened is closed
before it begins.
"""

import re
from dataclasses import dataclass

from longvlm.schemas.errors import ErrorCode, TerminalError

START, END = MARKS = "<think>", "</think>"
_SPAN = re.compile(rf"{START}(.*?)({END}|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Said:
    """What a model said."""

    answer: str | None  # None where it was still thinking when it ended
    thinking: str | None  # None where it did not think

    def fault(self, num_tokens: int, *, is_ended: bool) -> TerminalError | None:
        """Why this is no answer; None where it is one.

        Args:
            num_tokens: that were decoded.
            is_ended: the model itself came to an end; else it was cut off.
        """
        if self.answer or (self.answer is not None and (is_ended or self.thinking is None)):
            return None
        if is_ended:
            return TerminalError(ErrorCode.ANSWER_FAILED, "the model ended while it was thinking; word it differently.")
        return TerminalError(
            ErrorCode.CUT_OFF,
            f"all {num_tokens} tokens that were allowed, or fit the context, went into thinking, and the answer comes "
            "after it; raise --max-new-tokens.",
        )


def opens(cue: str) -> bool:
    """Whether a text, after which an answer stands, ends within thinking."""
    return cue.rstrip().endswith(START)


def closed(cue: str) -> str:
    """Such a text with nothing thought, as the templates write it that let one choose."""
    return f"{cue.rstrip()}\n\n{END}\n\n" if opens(cue) else cue


def split_thinking(text: str, *, is_open: bool) -> Said:
    """Take the thinking out of a decoded text, wherever it stands.

    Args:
        text: all that the model wrote.
        is_open: the prompt ended within thinking. A text that closes what it never opened is read so, too.
    """
    first_end = text.find(END)
    if is_open or -1 < first_end < (text + START).find(START):
        text = START + text
    spans = list(_SPAN.finditer(text))
    if not spans:
        return Said(text, None)
    thoughts = (span[1].replace(START, "").strip() for span in spans)
    answer = _SPAN.sub("", text).replace(END, "").strip()
    return Said(answer if spans[-1][2] else None, "\n".join(filter(None, thoughts)) or None)
