"""Agreement of answers: equal values for typed questions, equal text for the others."""

import json
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from longvlm.pipeline.answering.typed import read_value
from longvlm.pipeline.jsontext import compact
from longvlm.schemas.errors import InputError

RIGHT_ANSWER = ("answer", "A")  # the column's names in question files; the second in one of VideoChatGPT's layouts
_ARTICLES = {"a", "an", "the"}
_YES, _NO = ("yes", "true"), ("no", "false")


def is_same_answer(question: dict[str, Any], one: str, other: str) -> bool:
    """Whether two answers of a model are the same: as values, and as they are where neither is of the question's type.

    Args:
        question: type, choices and schema, as a row of tables.QUESTIONS.
        one: an answer as the model gave it.
        other: another.
    """
    values = read_value(question, one), read_value(question, other)
    if None in values:
        return values == (None, None) and one == other
    return _is_equal(question["type"], *values)  # type: ignore[arg-type] # neither is None


def is_right(question: dict[str, Any], answer: str, right: str) -> bool:
    """Whether an answer is the right one of a question file, as `read_right_answers` gives it.

    Text is right if it is equal as `normalised`.
    """
    if question["type"] == "text":
        return normalised(answer) == normalised(right)
    value, wanted = read_value(question, answer), right_value(question, right)
    return value is not None and wanted is not None and _is_equal(question["type"], value, wanted)


def read_right_answers(path: str, questions: dict[int, dict[str, Any]]) -> dict[int, str | None]:
    """The right answers to some questions of a file, None where it has none.

    Args:
        path: a file that `read_questions` has read.
        questions: rows of what it gave, by their place, the first being 0.

    Raises:
        InputError: an answer is not of its question's type.
    """
    cells = _column(Path(path))
    answers = {place: _text(cells[place]) for place in questions}
    for place, answer in answers.items():
        kind = questions[place]["type"]
        if answer is not None and kind != "text" and right_value(questions[place], answer) is None:
            raise InputError(
                f"row {place + 1} of the question file {path} is of type {kind}, but its right answer, {answer!r}, is "
                "not; correct it, or leave it empty."
            )
    return answers


def _column(file: Path) -> list[Any]:
    """The right answers as the file has them; `read_questions` has found the file to be sound."""
    if file.suffix in (".csv", ".parquet"):
        if file.suffix == ".csv":
            multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
            as_text = dict.fromkeys(RIGHT_ANSWER, pa.string())
            convert = pyarrow.csv.ConvertOptions(
                include_columns=list(RIGHT_ANSWER), include_missing_columns=True, column_types=as_text
            )
            table = pyarrow.csv.read_csv(file, parse_options=multiline, convert_options=convert)
        else:
            names = pyarrow.parquet.read_schema(file).names
            # the question's own column says how many rows there are where no right answers are
            wanted = [name for name in (*RIGHT_ANSWER, "question", "Q") if name in names]
            table = pyarrow.parquet.read_table(file, columns=wanted)
        rows = table.to_pylist()
    elif file.suffix == ".json":
        rows = _parse(file.read_text(encoding="utf-8-sig"))
    else:
        with file.open(encoding="utf-8-sig") as lines:
            rows = [_parse(line) for line in lines if line.strip()]
    return [next((row[name] for name in RIGHT_ANSWER if row.get(name) is not None), None) for row in rows]


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)  # NaN is how some tools write an empty cell


def _text(cell: Any) -> str | None:
    """A cell as text, None if it is empty; what is neither text nor empty, as JSON."""
    text = cell if cell is None or isinstance(cell, str) else compact(cell)
    return text or None


def right_value(question: dict[str, Any], right: str) -> str | None:
    """The value of a right answer as people write it, in the form of `read_value`."""
    if question["type"] == "bool":
        said = normalised(right)
        return "true" if said in _YES else "false" if said in _NO else None
    if question["type"] == "choice":
        return next((choice for choice in question["choices"] if _as_choice(choice) == _as_choice(right)), None)
    return read_value(question, right)


def _is_equal(kind: str, one: str, other: str) -> bool:
    """Whether two values are equal; numbers and JSON as what they mean, 7 and 7.0 alike."""
    if kind in ("number", "json"):
        return bool(json.loads(one) == json.loads(other))
    return one == other


def _as_choice(text: str) -> str:
    """A choice but for capitals and what stands around it; articles count, since "a" may be one."""
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def normalised(text: str) -> str:
    """Normalise a text: lower case, without articles, punctuation around its words, and more than a space between them.

    Signs inside a word stay: 3.5 is not 35. What consists of such words alone keeps its articles.
    """
    words = [bare for word in text.casefold().split() if (bare := word.strip(string.punctuation))]
    return " ".join([word for word in words if word not in _ARTICLES] or words)
