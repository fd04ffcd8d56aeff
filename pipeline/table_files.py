"""Question files (JSONL, CSV, parquet, a VideoChatGPT ground-truth JSON) to batches of text columns."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from longvlm.pipeline.jsontext import compact
from longvlm.schemas.errors import InputError

BATCH_ROWS = 1 << 16
_CSV_BLOCK_BYTES = 16 << 20  # no row of a CSV file may be longer

Columns = Mapping[str, tuple[str, ...]]  # by name: what a column is called in files, in order of preference
QUESTION_COLUMNS: Columns = {  # VideoChatGPT's files have two layouts
    "question_id": ("question_id",),
    "question": ("question", "Q"),
    "video": ("video", "video_id", "video_name"),
    "type": ("type",),
    "choices": ("choices",),
    "schema": ("schema", "json_schema"),
}
_COMPOUND = ("choices", "schema", "answer")  # what may be a list or an object, and is then JSON
CHOICES = pa.list_(pa.string())
TEXTS = pa.schema([(name, pa.string()) for name in QUESTION_COLUMNS])  # but choices may be a list, as parquet has them


def read_batches(path: str, columns: Columns = QUESTION_COLUMNS) -> Iterator[pa.RecordBatch]:
    """The rows of a file in its order, with the columns that are asked for, as text; others are left alone.

    A column under its synonym gets its own name. Numbers become text; lists and objects, JSON.

    Raises:
        InputError: the file is of no known kind, does not exist, is broken, lacks questions, or has in place of a text
            what cannot be one.
    """
    file = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        raise InputError(f"the question file {path} must end in one of {', '.join(readers)}.")
    if not file.is_file():
        raise InputError(f"the question file {path} does not exist.")
    return readers[file.suffix](file, columns)


def _jsonl(file: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    return _rows_to_batches(file, _json_lines(file), columns)


def _json_lines(file: Path) -> Iterator[Any]:
    try:
        with file.open(encoding="utf-8-sig") as lines:  # spreadsheets write a byte order mark
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield _parse(line)
                    except ValueError as error:
                        problem = f"line {number} of the question file {file} is not JSON ({error})."
                        raise InputError(problem) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error


def _json(file: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = _parse(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except ValueError as error:
        raise InputError(f"the question file {file} is not JSON ({error}).") from error
    if not isinstance(rows, list):
        raise InputError(f"the question file {file} must hold a list of questions, as VideoChatGPT's do.")
    return _rows_to_batches(file, rows, columns)


def _parse(text: str) -> Any:
    """Not as strict as jsontext.parse: NaN in a column that nobody reads does no harm."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _rows_to_batches(file: Path, rows: Iterable[Any], columns: Columns) -> Iterator[pa.RecordBatch]:
    texts = (_texts_of(file, number, row, columns) for number, row in enumerate(rows, start=1))
    schema = pa.schema([(name, pa.string()) for name in columns])
    while batch := list(islice(texts, BATCH_ROWS)):
        yield pa.RecordBatch.from_pylist(batch, schema=schema)


def _texts_of(file: Path, number: int, row: Any, columns: Columns) -> dict[str, str | None]:
    """A row's values as text: what is neither text nor a number as JSON, which only `_COMPOUND` columns may be."""
    if not isinstance(row, dict):
        raise InputError(f"row {number} of the question file {file} is not an object with a question.")
    texts: dict[str, str | None] = {}
    for field, names in columns.items():
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if field == "question" and not isinstance(value, str):
            value = None
        if isinstance(value, dict | list) and field not in _COMPOUND:
            raise InputError(f"row {number} of the question file {file} has a {field} that is not a text.")
        try:
            texts[field] = value if value is None or isinstance(value, str) else compact(value)
            (texts[field] or "").encode()
        except ValueError as error:
            problem = f"the {field} in row {number} of the question file {file} cannot be stored ({error})."
            raise InputError(problem) from error
    return texts


def _csv(file: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    if _is_blank(file):
        return
    multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
    blocks = pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
    names = _reading(file, lambda: pyarrow.csv.open_csv(file, blocks, multiline).schema.names)
    as_text = pyarrow.csv.ConvertOptions(  # an id such as 007 stays what it is
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    reader = _reading(file, lambda: pyarrow.csv.open_csv(file, blocks, multiline, as_text))
    yield from _table_batches(file, names, reader, columns)


def _parquet(file: Path, columns: Columns) -> Iterator[pa.RecordBatch]:
    content = _reading(file, lambda: pyarrow.parquet.ParquetFile(file))
    names = content.schema_arrow.names
    wanted = [name for name in chain.from_iterable(columns.values()) if name in names]
    yield from _table_batches(file, names, content.iter_batches(BATCH_ROWS, columns=wanted), columns)


def _table_batches(
    file: Path, names: list[str], batches: Iterator[pa.RecordBatch], columns: Columns
) -> Iterator[pa.RecordBatch]:
    if "question" in columns and not set(columns["question"]) & set(names):
        raise InputError(f"the question file {file} has no column question; it has {', '.join(map(str, names))}.")
    while (batch := _reading(file, lambda: next(batches, None))) is not None:
        yield _as_text(file, batch, columns)


def _reading(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"the question file {file} cannot be read as {file.suffix[1:]} ({reason}).") from error


def _as_text(file: Path, batch: pa.RecordBatch, wanted: Columns) -> pa.RecordBatch:
    """The columns that questions have, under their own names, as text; a list of choices stays one."""
    columns: dict[str, pa.Array] = {}
    for field, names in wanted.items():
        found = []
        for name in (name for name in names if name in batch.schema.names):
            column = batch.column(batch.schema.names.index(name))
            kind = CHOICES if field == "choices" and pa.types.is_list(column.type) else pa.string()
            try:
                found.append(column.cast(kind))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(
                    f"the column {name} of the question file {file} is of type {column.type}; write it as text."
                ) from error
        columns[field] = pc.coalesce(*found) if found else pa.nulls(len(batch), pa.string())
    return pa.RecordBatch.from_pydict(columns)


def _is_blank(file: Path) -> bool:
    """Whether a text file holds nothing but white space; InputError if it is not UTF-8."""
    try:
        with file.open(encoding="utf-8-sig") as text:
            pieces = [bool(piece.strip()) for piece in iter(lambda: text.read(1 << 20), "")]
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    return not any(pieces)


def _not_utf8(file: Path) -> InputError:
    return InputError(f"the question file {file} is not UTF-8 text; save it as UTF-8.")
