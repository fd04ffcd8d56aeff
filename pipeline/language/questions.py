"""Questions read from a file: JSONL, CSV, parquet, or a VideoChatGPT ground-truth JSON."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from schemas.errors import InputError

_SYNONYMS = {  # a row's name for each field, in order of preference; VideoChatGPT's files have two layouts
    "question": ("question", "Q"),
    "question_id": ("question_id",),
    "video": ("video", "video_id", "video_name"),
    "type": ("type",),
}


def question_hash(question: str) -> str:
    """16 hex characters that stand for a question's text."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Question:
    """A question, about one video or, where it names none, about each video of a selection."""

    question_id: str
    question: str
    video: str | None = None  # uri, external_id, path, or a file's unique stem
    type: str | None = None

    @property
    def hash(self) -> str:
        """Stands for the text, so that an id whose question was reworded is asked again."""
        return question_hash(self.question)


def ask(question: str) -> Question:
    """One question about every video; its id is its text's hash."""
    return Question(question_hash(question), question)


def read_questions(path: str) -> list[Question]:
    """The questions of a file, in its order, each once.

    Rows have `question` (in VideoChatGPT's files `Q`) and may have `question_id` (else the text's hash), `video` (also
    as `video_id` or `video_name`) and `type`; other columns, such as the right answer, are left alone.

    Raises:
        InputError: the file does not exist, is empty or broken, lacks `question`, or gives one id to two questions.
    """
    file = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".parquet": _table}
    if file.suffix not in readers:
        raise InputError(f"the question file {path} must end in one of {', '.join(readers)}.")
    if not file.is_file():
        raise InputError(f"the question file {path} does not exist.")
    rows = readers[file.suffix](file)
    if not rows:
        raise InputError(f"the question file {path} holds no questions.")
    questions = [_question(path, number, row) for number, row in rows]
    _check_ids(path, questions)
    return list(dict.fromkeys(questions))


def _jsonl(file: Path) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise InputError(f"line {number} of the question file {file} is not JSON ({error}).") from error
    return rows


def _json(file: Path) -> list[tuple[int, Any]]:
    text = _text(file)
    try:
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise InputError(f"the question file {file} is not JSON ({error}).") from error
    if not isinstance(rows, list):
        raise InputError(f"the question file {file} must hold a list of questions, as VideoChatGPT's do.")
    return _numbered(rows)


def _table(file: Path) -> list[tuple[int, Any]]:
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.read_table(file)
        elif not _text(file).strip():
            return []
        else:
            names = pyarrow.csv.open_csv(file).schema.names
            as_text = pyarrow.csv.ConvertOptions(  # an id such as 007 stays what it is
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
            )
            multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(file, convert_options=as_text, parse_options=multiline)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the question file {file} cannot be read as {file.suffix[1:]} ({reason}).") from error
    if table.num_rows and not set(_SYNONYMS["question"]) & set(table.column_names):
        raise InputError(
            f"the question file {file} has no column question; it has {', '.join(map(str, table.column_names))}."
        )
    return _numbered(table.to_pylist())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"the question file {file} is not UTF-8 text; save it as UTF-8.") from error


def _numbered(rows: Iterable[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(rows, start=1))


def _question(path: str, number: int, row: Any) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"row {number} of the question file {path} is not an object with a question.")
    values = {
        field: next((row[name] for name in names if row.get(name) is not None), None)
        for field, names in _SYNONYMS.items()
    }
    question = values["question"]
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"row {number} of the question file {path} has no text in its column question.")
    question_id, video, kind = (
        None if values[field] is None else str(values[field]) for field in ("question_id", "video", "type")
    )
    return Question(question_id or question_hash(question), question, video, kind)


def _check_ids(path: str, questions: list[Question]) -> None:
    """An id may stand for one question about many videos, but not for two questions about one."""
    texts: dict[tuple[str, str | None], str] = {}
    for question in questions:
        known = texts.setdefault((question.question_id, question.video), question.question)
        if known != question.question:
            raise InputError(
                f"the question file {path} gives the question_id {question.question_id} to two different questions "
                f'("{known}" and "{question.question}"); number them apart.'
            )
