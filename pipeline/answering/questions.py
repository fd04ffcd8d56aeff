"""Questions: one asked on the spot, or those of a file.

Whole columns are checked and repaired at a time: ten million questions of a parquet file take seconds, and little more
memory than they need in the end. Choices and schemas, which few rows have of their own, are parsed once for each that
differs.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longvlm.pipeline.jsontext import compact, parse
from longvlm.pipeline.table_files import LIST, Column, Columns, read_batches, table_batches
from longvlm.pipeline.text_files import UserFile
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import QUESTION_TYPES, QUESTIONS

if TYPE_CHECKING:
    import pandas as pd

QUESTION_COLUMNS: Columns = {  # VideoChatGPT's files have two layouts
    "question_id": Column(("question_id",)),
    "question": Column(("question", "Q"), "text", required=True),
    "video": Column(("video", "video_id", "video_name")),
    "type": Column(("type",)),
    "choices": Column(("choices",), "list"),
    "schema": Column(("schema", "json_schema"), "json"),
}
TEXTS = pa.schema([(name, pa.string()) for name in QUESTION_COLUMNS])  # but choices may be a list, as parquet has them

# What may be wrong with rows: which of them, and what to say of one.
CHOICE_SEPARATOR = "|"  # of choices in one text, in a cell as on the command line; commas belong to them

Check = tuple[pa.Array, Callable[[int], str]]


def ask(question: str, kind: str = "text", choices: Sequence[str] = ()) -> pa.Table:
    """One question about every video, as a table of tables.QUESTIONS; its id is null, which its hash stands in for.

    Raises:
        InputError: the question is empty or no UTF-8, there is no such type, or its choices do not go with it.
    """
    row = {"question": question, "type": kind, "choices": json.dumps(list(choices)) if choices else None}
    try:
        texts = pa.RecordBatch.from_pylist([row], schema=TEXTS)
    except UnicodeEncodeError as error:  # what a terminal of another encoding hands over
        raise InputError("the question is not UTF-8 text; type it again, or read it from a file.") from error
    return check_texts(texts, lambda _: "the question")


def read_questions(path: str) -> pa.Table:
    """The questions of a file in its order, as a table of tables.QUESTIONS.

    Rows (of CSV, JSON, JSONL or parquet) have `question` (in VideoChatGPT's files `Q`) and may have `question_id`,
    `video` (also as `video_id` or `video_name`), `type` (else text), `choices` (a list, or "red|green|blue") and
    `schema` (also as `json_schema`; an object or its text). Numbers that serve as ids become text; empty cells are
    null; other columns, such as the right answer, are left alone. Rows may repeat each other: only with the videos
    known can one tell.

    Raises:
        InputError: the file does not exist, is empty or broken, or lacks `question`; or a row has no question, a type
            that there is not, choices or a schema that do not go with its type, or a schema that cannot be used.
    """
    file = UserFile(path, "question file")
    return _checked(file, read_batches(file, QUESTION_COLUMNS))


def check_questions(rows: "pa.Table | pd.DataFrame") -> pa.Table:
    """The questions of a table in memory; its columns are those of a question file, see `read_questions`."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pandas(rows, preserve_index=False)
    given = UserFile("given", "table of questions")
    return _checked(given, table_batches(given, table, QUESTION_COLUMNS))


def _checked(file: UserFile, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    checked: list[pa.Table] = []
    num_rows = 0
    for batch in batches:
        checked.append(check_texts(batch, file.row, num_rows))
        num_rows += len(batch)
    if not num_rows:
        raise InputError(f"{file} holds no questions.")
    return pa.concat_tables(checked)


def check_texts(texts: pa.RecordBatch, name_row: Callable[[int], str], rows_before: int = 0) -> pa.Table:
    """Rows as tables.QUESTIONS; InputError, which `name_row` begins, for the first that cannot be asked."""
    question = texts["question"]
    kind = pc.fill_null(_not_empty(texts["type"]), "text")
    choices, choice_problems = _parsed_choices(texts["choices"])
    schema, schema_problems = _parsed(_not_empty(texts["schema"]), _schema_text, pa.string())
    is_choice, has_choices = pc.equal(kind, "choice"), pc.is_valid(choices)
    checks: list[Check] = [
        (
            pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(question, ""))), 0),
            lambda _: "has no text in its column question",
        ),
        (
            pc.invert(pc.is_in(kind, pa.array(QUESTION_TYPES))),
            lambda row: f"is of type {kind[row].as_py()!r}, which is none of {', '.join(QUESTION_TYPES)}",
        ),
        (pc.is_valid(choice_problems), lambda row: f"has choices that cannot be used: {choice_problems[row]}"),
        (
            pc.and_(has_choices, pc.invert(is_choice)),
            lambda row: f"has choices, but is of type {kind[row]}; they go with the type choice",
        ),
        (
            pc.and_(is_choice, pc.less(_num_distinct(choices), 2)),
            lambda row: f"is of type choice and needs at least two choices that differ, none empty{_one(choices[row])}",
        ),
        (pc.is_valid(schema_problems), lambda row: f"has a schema that cannot be used: {schema_problems[row]}"),
        (
            pc.and_(pc.is_valid(schema), pc.not_equal(kind, "json")),
            lambda row: f"has a schema, but is of type {kind[row]}; it goes with the type json",
        ),
    ]
    wrong = [(row, say) for mask, say in checks if (row := pc.index(mask, value=True).as_py()) >= 0]
    if wrong:
        row, say = min(wrong, key=lambda found: found[0])
        raise InputError(f"{name_row(rows_before + row)} {say(row)}.")
    columns = [_not_empty(texts["question_id"]), question, _not_empty(texts["video"]), kind, choices, schema]
    return pa.Table.from_arrays(columns, schema=QUESTIONS)


def _not_empty(texts: pa.Array) -> pa.Array:
    """Empty texts as null: so a spreadsheet writes what is not there."""
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _parsed_choices(column: pa.Array) -> tuple[pa.Array, pa.Array]:
    if pa.types.is_list(column.type):
        parsed, problems = column, pa.nulls(len(column), pa.string())
    else:
        parsed, problems = _parsed(_not_empty(column), _choice_list, LIST)
    return pc.if_else(pc.equal(pc.list_value_length(parsed), 0), pa.scalar(None, LIST), parsed), problems


def _parsed(texts: pa.Array, parse_text: Callable[[str], Any], kind: pa.DataType) -> tuple[pa.Array, pa.Array]:
    """What texts mean, each distinct one parsed once; and why, where `parse_text` raises ValueError."""
    if texts.null_count == len(texts):
        return pa.nulls(len(texts), kind), pa.nulls(len(texts), pa.string())
    codes = texts.dictionary_encode()
    values: list[Any] = []
    problems: list[str | None] = []
    for text in codes.dictionary.to_pylist():
        try:
            values.append(parse_text(text))
            problems.append(None)
        except ValueError as error:
            values.append(None)
            problems.append(str(error))
    return (
        pa.array(values, kind).take(codes.indices),
        pa.array(problems, pa.string()).take(codes.indices),
    )


def _one(choices: pa.ListScalar) -> str:
    """What to do about choices that are one with a comma in it; empty where they are not."""
    given = choices.as_py() or []
    if len(given) != 1 or "," not in given[0]:
        return ""
    return f"; {given[0]!r} is one choice, for they are separated by {CHOICE_SEPARATOR}"


def _choice_list(text: str) -> list[str]:
    if not text.lstrip().startswith("["):
        return [choice.strip() for choice in text.split(CHOICE_SEPARATOR)]
    choices = parse(text)
    if any(isinstance(choice, dict | list | None) for choice in choices):
        raise ValueError("a choice is a text or a number")
    return [choice if isinstance(choice, str) else compact(choice) for choice in choices]


def _schema_text(text: str) -> str:
    from longvlm.pipeline.answering.grammar import check_schema  # with llguidance, which other questions do not need

    check_schema(text)
    return compact(parse(text))  # the same schema is the same text, however a file lays it out


def _num_distinct(choices: pa.Array) -> pa.Array:
    """How many choices each row has, repeated ones counted once; 0 where one is empty or there are none."""
    if choices.null_count == len(choices):
        return pa.repeat(pa.scalar(0, pa.int64()), len(choices))
    each = pa.table({"row": pc.list_parent_indices(choices), "choice": pc.list_flatten(choices)})
    is_empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(each["choice"], ""))), 0)
    counts = each.append_column("is_empty", is_empty).group_by("row")
    counts = counts.aggregate([("choice", "count_distinct"), ("is_empty", "any")])
    number = pc.if_else(counts["is_empty_any"], 0, counts["choice_count_distinct"])
    rows = pa.array(np.arange(len(choices)), counts["row"].type)
    return pc.fill_null(number.combine_chunks().take(pc.index_in(rows, counts["row"].combine_chunks())), 0)
