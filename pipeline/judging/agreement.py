"""Agreement of answers: equal values for typed questions, equal text for the others."""

import json
import string
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from longvlm.pipeline.answering.typed import read_value
from longvlm.pipeline.table_files import Column, read_batches
from longvlm.pipeline.text_files import UserFile
from longvlm.schemas.errors import InputError

RIGHT_ANSWER = Column(("answer", "A"), "json")  # the second name is in one of VideoChatGPT's layouts
_ARTICLES = {"a", "an", "the"}
_YES, _NO = ("yes", "true"), ("no", "false")


def is_same_answer(question: Mapping[str, Any], one: str, other: str) -> bool:
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


def is_right(question: Mapping[str, Any], answer: str, right: str) -> bool:
    """Whether an answer is the right one of a question file, as `read_right_answers` gives it.

    Text is right if it is equal as `normalised`.
    """
    if question["type"] == "text":
        return normalised(answer) == normalised(right)
    value, wanted = read_value(question, answer), right_value(question, right)
    return value is not None and wanted is not None and _is_equal(question["type"], value, wanted)


def read_right_answers(path: str, questions: Mapping[int, Mapping[str, Any]]) -> dict[int, str | None]:
    """The right answers to some questions of a file, None where it has none.

    Args:
        path: a file that `read_questions` has read.
        questions: rows of what it gave, by their place, the first being 0.

    Raises:
        InputError: an answer is not of its question's type, or the file cannot be read any more.
    """
    file = UserFile(path, "question file")
    cells = pa.chunked_array([batch["answer"] for batch in read_batches(file, {"answer": RIGHT_ANSWER})], pa.string())
    answers = {place: cells[place].as_py() or None for place in questions}
    for place, answer in answers.items():
        kind = questions[place]["type"]
        if answer is not None and kind != "text" and right_value(questions[place], answer) is None:
            raise InputError(
                f"{file.row(place)} is of type {kind}, but its right answer, {answer!r}, is not; correct it, or leave "
                "it empty."
            )
    return answers


def right_value(question: Mapping[str, Any], right: str) -> str | None:
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
