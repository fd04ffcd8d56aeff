"""Training data: files of conversations in the reference's format or of instruction rows, checked (LONGVLM.md, 7).

A row of the reference's format is `{"id", "video", "conversations": [{"from": "human" | "gpt", "value"}]}`, an
instruction row `{"video_id", "q", "a"}`. Wherever a file puts `<video>` in the first question, the video comes before
its text here: as it does when the model is asked. A row `{"video_id", "start_s", "caption"}` is a timed caption: what
is seen from that second on, for models whose prompts have time markers to learn it at (`packing`).
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from longvlm.schemas import tables
from longvlm.schemas.errors import InputError

VIDEO = "<video>"  # where a turn shows the video; it never reaches a prompt
ROLES = ("human", "gpt")
_INSTRUCTION = {"video": ("video_id", "video"), "question": ("q", "question"), "answer": ("a", "answer")}


def read_conversations(path: str) -> pa.Table:
    """A file (JSON, JSONL, CSV, parquet) of conversations or instruction rows, as tables.CONVERSATIONS.

    Raises:
        InputError: the file does not exist, is of no known kind or broken, or a row lacks something; the first is told.
    """
    file = Path(path)
    readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        raise InputError(f"the conversations {path} must be a file that ends in one of {', '.join(readers)}.")
    if not file.is_file():
        raise InputError(f"the file of conversations {path} does not exist.")
    try:
        rows = readers[file.suffix](file)
        found = check_conversations(rows)
    except (ValueError, OSError) as error:  # not JSON, not UTF-8, not parquet
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the conversations {path} cannot be read as {file.suffix[1:]} ({reason}).") from error
    if not len(found):
        raise InputError(f"the file {path} holds no conversations.")
    return found


def check_conversations(rows: Iterable[Any]) -> pa.Table:
    """Rows of either format as tables.CONVERSATIONS.

    Raises:
        InputError: a row lacks something, or its turns do not alternate.
    """
    return pa.Table.from_pylist([_checked(number, row) for number, row in enumerate(rows, 1)], tables.CONVERSATIONS)


def to_reference(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Instruction rows {video_id, q, a} in the reference's format: the video after every even question, before others.

    Raises:
        InputError: a row lacks something.
    """
    converted = []
    for number, row in enumerate(rows):
        video, question, answer = (_text(row, names, f"row {number + 1}") for names in _INSTRUCTION.values())
        asked = f"{VIDEO}\n{question}" if number % 2 else f"{question}\n{VIDEO}"
        turns = [{"from": role, "value": text} for role, text in zip(ROLES, (asked, answer), strict=True)]
        converted.append({"id": video, "video": video, "conversations": turns})
    return converted


def _checked(number: int, row: Any) -> dict[str, Any]:
    """One row as tables.CONVERSATIONS has it."""
    if not isinstance(row, dict):
        raise InputError(f"row {number} of the conversations is not an object.")
    named = row.get("id")
    name = f"row {number} of the conversations" + ("" if named is None else f" ({named})")
    key = str(number if named is None else named)
    if row.get("caption") is not None:
        return _timed(key, name, row)
    if row.get("conversations") is None:
        video, question, answer = (_text(row, names, name) for names in _INSTRUCTION.values())
        return _row(key, video, [{"question": strip_placeholder(question), "answer": answer}])
    turns = _alternating(row["conversations"], name)
    if any(VIDEO in text for text in turns[1:]):
        raise InputError(f"{name} has {VIDEO} after its first question, and a video is shown once; take that out.")
    turns[0] = strip_placeholder(turns[0])
    pairs = [{"question": turns[i], "answer": turns[i + 1]} for i in range(0, len(turns), 2)]
    return _row(key, _text(row, ("video", "id"), name), pairs)


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
    return _row(key, _text(row, _INSTRUCTION["video"], name), [caption], at_s)


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
    return found


def _json(file: Path) -> list[Any]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise InputError(f"the file {file} must hold a list of conversations.")
    return rows


def _jsonl(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _csv(file: Path) -> list[Any]:
    multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
    names = pyarrow.csv.open_csv(file, parse_options=multiline).schema.names
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
    rows: list[Any] = pyarrow.csv.read_csv(file, parse_options=multiline, convert_options=as_text).to_pylist()
    return rows


def _parquet(file: Path) -> Iterator[Any]:
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()
