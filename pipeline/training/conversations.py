"""Training data: files of conversations in the reference's format or of instruction rows, checked (LONGVLM.md, 7).

A row of the reference's format is `{"id", "video", "conversations": [{"from": "human" | "gpt", "value"}]}`, an
instruction row `{"video_id", "q", "a"}`. Wherever a file puts `<video>` in the first question, the video comes before
its text here: as it does when the model is asked. A row `{"video_id", "start_s", "caption"}` is a timed caption: what
is seen from that second on, for models whose prompts have time markers to learn it at (`packing`).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from longvlm.pipeline.table_files import read_rows, text_of
from longvlm.pipeline.text_files import UserFile
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import CONVERSATIONS

VIDEO = "<video>"  # where a turn shows the video; it never reaches a prompt
ROLES = ("human", "gpt")
_INSTRUCTION = {"video": ("video_id", "video"), "question": ("q", "question"), "answer": ("a", "answer")}
_NAMES = ("id", "conversations", "start_s", "caption", *(name for names in _INSTRUCTION.values() for name in names))


def read_conversations(path: str) -> pa.Table:
    """A file (JSON, JSONL, CSV, parquet) of conversations or instruction rows, as CONVERSATIONS.

    Raises:
        InputError: the file does not exist, is of no known kind, empty or broken, or a row lacks something; the first
            is named.
    """
    file = UserFile(path, "conversation file")
    found = check_conversations(read_rows(file, _NAMES), str(file))
    if not len(found):
        raise InputError(f"{file} holds no conversations.")
    return found


def check_conversations(rows: Iterable[Any], where: str = "the conversations") -> pa.Table:
    """Rows of either format as CONVERSATIONS; `where` is what sentences call the place that they come from.

    Raises:
        InputError: a row lacks something, or its turns do not alternate.
    """
    checked = [_checked(number, row, f"row {number} of {where}") for number, row in enumerate(rows, 1)]
    return pa.Table.from_pylist(checked, CONVERSATIONS)


def to_reference(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Instruction rows {video_id, q, a} in the reference's format: the video after every even question, before others.

    Raises:
        InputError: a row lacks something.
    """
    converted = []
    for number, row in enumerate(rows):
        video, question, answer = _instruction(row, f"row {number + 1}")
        asked = f"{VIDEO}\n{question}" if number % 2 else f"{question}\n{VIDEO}"
        turns = [{"from": role, "value": text} for role, text in zip(ROLES, (asked, answer), strict=True)]
        converted.append({"id": video, "video": video, "conversations": turns})
    return converted


def _checked(number: int, row: Any, name: str) -> dict[str, Any]:
    """One row as CONVERSATIONS has it."""
    if not isinstance(row, dict):
        raise InputError(f"{name} is not an object.")
    key = str(number)
    if row.get("id") is not None:
        key = _stored(row["id"], name)
        name = f"{name} ({key})"
    if row.get("caption") is not None:
        return _timed(key, name, row)
    if row.get("conversations") is None:
        video, question, answer = _instruction(row, name)
        return _row(key, video, [{"question": strip_placeholder(question), "answer": answer}])
    turns = _alternating(row["conversations"], name)
    if any(VIDEO in text for text in turns[1:]):
        raise InputError(f"{name} has {VIDEO} after its first question, and a video is shown once; take that out.")
    turns[0] = strip_placeholder(turns[0])
    pairs = [{"question": turns[i], "answer": turns[i + 1]} for i in range(0, len(turns), 2)]
    return _row(key, _id(row, ("video", "id"), name), pairs)


def _timed(key: str, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A timed caption."""
    try:
        at_s = float(row.get("start_s", "nan"))
    except (TypeError, ValueError):
        at_s = math.nan
    if not 0 <= at_s < math.inf:
        raise InputError(
            f"{name} has a caption, but start_s is {row.get('start_s')!r}; write when it begins, in seconds."
        )
    caption = {"question": "", "answer": _text(row, ("caption",), name)}
    return _row(key, _id(row, _INSTRUCTION["video"], name), [caption], at_s)


def _instruction(row: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Video, question and answer."""
    video, question, answer = _INSTRUCTION.values()
    return _id(row, video, name), _text(row, question, name), _text(row, answer, name)


def _row(key: str, video: str, turns: list[dict[str, str]], at_s: float | None = None) -> dict[str, Any]:
    return {"id": key, "video": video, "turns": turns, "at_s": at_s}


def strip_placeholder(question: str) -> str:
    """A first question without the placeholder and the line break that sets it off."""
    return question.replace(f"{VIDEO}\n", "").replace(f"\n{VIDEO}", "").replace(VIDEO, "")


def _alternating(turns: Any, name: str) -> list[str]:
    """The texts of a conversation, question and answer in turn; a leading answer is dropped, as in the reference."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{name}: conversations must be a list of turns, each with from and value.")
    roles = [turn.get("from") for turn in turns]
    if roles[:1] == ["gpt"]:
        turns, roles = turns[1:], roles[1:]
    if not turns or len(turns) % 2 or roles != [ROLES[i % 2] for i in range(len(roles))]:
        said = ", ".join(map(str, roles)) or "nobody"
        raise InputError(f"{name}: human and gpt must alternate and gpt have the last word, but there speak: {said}.")
    return [_text(turn, ("value",), f"turn {place} of {name}") for place, turn in enumerate(turns, 1)]


def _text(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"{where} has no text in {' or '.join(names)}; every one needs it.")
    return _stored(found, where)


def _id(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    """A text, or a number as text."""
    found = next((row[name] for name in names if row.get(name) is not None), None)
    return _stored(found, where) if isinstance(found, int | float) else _text(row, names, where)


def _stored(value: Any, where: str) -> str:
    try:
        return str(text_of(value))
    except ValueError as error:
        raise InputError(f"{where} has a text or number that cannot be stored ({error}).") from error
