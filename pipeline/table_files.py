"""Rows out of CSV, JSON, JSONL and parquet files: as batches of the columns that are asked for, or as objects.

Every file of rows that a user gives is read here: questions, labels, manifests, conversations. What a cell holds does
not depend on the kind of file. Empty cells and NaN are null. Numbers become text where text is asked for, and a whole
float becomes the text of the integer, "17" of 17.0: a program that knows no gaps in a column of integers, as pandas,
made it one. What is text already, as every cell of a CSV file, stays as it is written: "007", "17.0".
"""

import csv
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from longvlm.pipeline.jsontext import compact
from longvlm.pipeline.text_files import UserFile, open_file, read_lines
from longvlm.pipeline.uris import refusals_as_sentences
from longvlm.pipeline.visible import escaped_bytes, is_utf8
from longvlm.schemas.errors import InputError

BATCH_ROWS = 1 << 16
LIST = pa.list_(pa.string())
_TEXTS = {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()}  # bytes: texts of who knows
NOT_UTF8 = "\0not UTF-8"  # ends a text, shown escaped, that is not; only in files judged by row
_GAPS = frozenset({"na", "n/a", "nan", "null", "none"})  # how programs write a number that there is not
_MAX_COUNT = (1 << 63) - 1


@dataclass(frozen=True)
class Column:
    """A column that is asked for.

    `holds` says what its cells are read as: "text", which they must be; "value", text or numbers, as text; "json", also
    lists and objects, as JSON; "list", the same, but parquet's lists stay lists of texts; "count", whole numbers from 0
    on, however they are written, as int64.
    """

    names: tuple[str, ...]  # what it is called in files; a row has the first of them that holds something
    holds: Literal["text", "value", "json", "list", "count"] = "value"
    required: bool = False  # by CSV and parquet files, whose columns are known before their rows


Columns = Mapping[str, Column]  # by the name that the column has from here on
_Piece = Any  # rows as they come: a RecordBatch, or a list of what JSON holds


def is_table(address: str) -> bool:
    """Whether an address ends like a file of rows; capitals do not matter."""
    return _ending(address) in _READERS


def read_batches(file: UserFile, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The rows of a file in its order, with the columns asked for; a batch is in memory at a time, of JSON the file.

    Raises:
        InputError: the file is of no known kind, is not there, empty or broken, lacks a required column, or has in
            place of a text or number what cannot be one.
    """
    return _batches(file, _pieces(file, columns), columns)


def table_batches(named: UserFile, table: pa.Table, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The columns asked for of a table in memory, read as those of a parquet file; InputError as from `read_batches`.

    Args:
        named: what sentences call the table.
        table: it may have other columns too.
        columns: those asked for.
    """
    selected = table.select(_selected(named, table.column_names, columns))
    return _batches(named, selected.to_batches(max_chunksize=BATCH_ROWS), columns)


def _batches(file: UserFile, pieces: Iterable[_Piece], columns: Columns) -> Iterator[pa.RecordBatch]:
    rows_before = 0
    for piece in pieces:
        read = _read_table if isinstance(piece, pa.RecordBatch) else _read_objects
        found = read(file, rows_before, piece, columns)
        for name, column in columns.items():
            if column.holds == "count":
                found[name] = _counts(file, rows_before, name, found[name])
        yield pa.RecordBatch.from_pydict(found)
        rows_before += len(piece)


def read_rows(file: UserFile, names: Iterable[str]) -> Iterator[Any]:
    """The rows of a file one by one, as objects with what the file has under these names.

    In JSON a row may be something else, which is for the caller to judge. InputError as from `read_batches`.
    """
    names = list(names)
    for piece in _pieces(file, {name: Column((name,)) for name in names}):
        for row in piece.to_pylist() if isinstance(piece, pa.RecordBatch) else piece:
            yield {name: _known(row.get(name)) for name in names} if isinstance(row, dict) else row


def text_of(value: Any) -> str | None:
    """A cell as text: a whole float as its integer, another number, list or object as JSON; None if there is nothing.

    Raises:
        ValueError: it is infinite, or holds half a surrogate pair, which no UTF-8 text can hold.
    """
    value = _known(value)
    if value is None:
        return None
    if isinstance(value, str):
        value.encode()
        return value
    return compact(int(value) if isinstance(value, float) and value.is_integer() else value)


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _ending(address: str) -> str:
    return PurePosixPath(address).suffix.lower()


def _pieces(file: UserFile, columns: Columns) -> Iterator[_Piece]:
    """The rows of a file of any kind."""
    if not is_table(file.address):
        raise InputError(f"{file} must end in one of {', '.join(_READERS)}.")
    return _READERS[_ending(file.address)](file, columns)


def _selected(file: UserFile, found: list[str], columns: Columns) -> list[str]:
    """The columns to read; InputError where one is required and not there, or there twice."""
    for name, column in columns.items():
        if column.required and not set(column.names) & set(found):
            raise InputError(f"{file} has no column {name}; it has {', '.join(found)}.")
    selected = [name for name in chain.from_iterable(column.names for column in columns.values()) if name in found]
    for name in selected:
        if found.count(name) > 1:
            raise InputError(f"{file} has {found.count(name)} columns {name}; keep one.")
    return selected


def _csv(file: UserFile, columns: Columns, delimiter: str = ",") -> Iterator[_Piece]:
    rows = _csv_rows(file, delimiter)
    header = next(rows, [])
    names = [escaped_bytes(name.strip()) for name in header]
    if not any(names):
        raise _empty(file)
    selected = _selected(file, names, columns)
    places = [names.index(name) for name in selected]
    rows_before = 0
    while batch := list(islice(rows, BATCH_ROWS)):
        _check_rows(file, rows_before, batch, header)
        rows_before += len(batch)
        texts = [pa.array([_utf8(row[place]) or None for row in batch], pa.string()) for place in places]
        whole = pa.StructArray.from_arrays(texts, selected) if selected else pa.array([{}] * len(batch), pa.struct([]))
        yield pa.RecordBatch.from_struct_array(whole)


def _csv_rows(file: UserFile, delimiter: str) -> Iterator[list[str]]:
    """The cells of each row, the header's first; empty lines are none."""
    reader = csv.reader(read_lines(file, newline=""), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for row in reader:
            if row:
                yield row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"the row that begins in line {begins} of {file} is not CSV ({error}); look for a quote that is not closed."
        ) from error


def _check_rows(file: UserFile, rows_before: int, rows: list[list[str]], header: list[str]) -> None:
    """Raise InputError for the first row that is not as wide as the header, or is the header."""
    if {*map(len, rows)} == {len(header)} and header not in rows:
        return
    for place, row in enumerate(rows, start=rows_before):
        if len(row) != len(header):
            raise InputError(
                f"{file.row(place)} has {len(row)} cells, but the header has {len(header)}; put quotes around a text "
                "with separators in it."
            )
        if row == header:
            raise InputError(f"{file.row(place)} is the header once more; remove it.")


def _parquet(file: UserFile, columns: Columns) -> Iterator[_Piece]:
    with open_file(file) as source:
        content = _reading(file, lambda: parquet.ParquetFile(source))
        selected = _selected(file, content.schema_arrow.names, columns)
        batches = content.iter_batches(BATCH_ROWS, columns=selected)
        while (batch := _reading(file, lambda: next(batches, None))) is not None:
            yield batch


def _reading(file: UserFile, read: Callable[[], Any]) -> Any:
    with refusals_as_sentences(str(file)):
        try:
            return read()
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(f"{file} cannot be read as parquet ({reason}).") from error


def _jsonl(file: UserFile, _columns: Columns) -> Iterator[_Piece]:
    rows = (
        _parsed(f"line {number} of {file}", line)
        for number, line in enumerate(read_lines(file), start=1)
        if line.strip()
    )
    is_empty = True
    while batch := list(islice(rows, BATCH_ROWS)):
        is_empty = False
        yield batch
    if is_empty:
        raise _empty(file)


def _json(file: UserFile, _columns: Columns) -> Iterator[_Piece]:
    text = "".join(read_lines(file))
    if not text.strip():
        raise _empty(file)
    rows = _parsed(str(file), text)
    if not isinstance(rows, list):
        raise InputError(f"{file} must hold a list of rows, [{{...}}, ...].")
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS]


def _parsed(where: str, text: str) -> Any:
    """Not as strict as jsontext.parse: NaN or a raw tab in a column that nobody reads does no harm."""
    try:
        return json.loads(text, strict=False)
    except RecursionError as error:
        raise InputError(f"{where} is not JSON (it is nested too deeply).") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}).") from error


def _empty(file: UserFile) -> InputError:
    return InputError(f"{file} is empty; was it written to its end?")


_READERS: dict[str, Callable[[UserFile, Columns], Iterator[_Piece]]] = {
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}


def _read_objects(file: UserFile, rows_before: int, rows: list[Any], columns: Columns) -> dict[str, pa.Array]:
    texts = [_texts(file, place, row, columns) for place, row in enumerate(rows, start=rows_before)]
    return {name: pa.array([row[name] for row in texts], pa.string()) for name in columns}


def _texts(file: UserFile, place: int, row: Any, columns: Columns) -> dict[str, str | None]:
    """The cells of an object as text."""
    if not isinstance(row, dict):
        raise InputError(f"{file.row(place)} is not an object with names and values.")
    texts = {}
    for name, column in columns.items():
        value = next((row[other] for other in column.names if _known(row.get(other)) is not None), None)
        if column.holds == "text" and value is not None and not isinstance(value, str):
            raise InputError(f"{file.row(place)} has no text in its column {name}, but {reprlib.repr(value)}.")
        if isinstance(value, dict | list) and column.holds not in ("json", "list"):
            raise InputError(f"{file.row(place)} has a {name} that is not a text.")
        texts[name] = _stored(file, place, name, value)
    return texts


def _utf8(text: str) -> str:
    """A text as a table can hold it: what is not UTF-8 escaped, and marked at its end."""
    return text if is_utf8(text) else escaped_bytes(text) + NOT_UTF8


def _stored(file: UserFile, place: int, name: str, value: Any) -> str | None:
    try:
        return text_of(_utf8(value) if file.is_judged_by_row and isinstance(value, str) else value)
    except ValueError as error:
        raise InputError(f"the {name} in {file.row(place)} cannot be stored ({error}).") from error


def _read_table(file: UserFile, rows_before: int, batch: pa.RecordBatch, columns: Columns) -> dict[str, pa.Array]:
    found = {}
    for name, column in columns.items():
        there = [
            _cast(file, rows_before, batch, other, column) for other in column.names if other in batch.schema.names
        ]
        found[name] = pc.coalesce(*there) if there else pa.nulls(len(batch), pa.string())
    return found


def _cast(file: UserFile, rows_before: int, batch: pa.RecordBatch, name: str, column: Column) -> pa.Array:
    """A column of a table as text, or as lists of it where these are asked for."""
    values = batch.column(name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind, is_list = values.type, pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
    if column.holds == "text" and pa.types.is_primitive(kind):
        raise _not_text(file, name, kind)
    try:
        if is_list and column.holds == "list":
            return values.cast(LIST)
        if pa.types.is_floating(kind) or (is_list and column.holds == "json"):
            cells = enumerate(values.to_pylist(), start=rows_before)
            return pa.array([_stored(file, place, name, value) for place, value in cells], pa.string())
        if kind not in _TEXTS:
            return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise _not_text(file, name, kind) from error
    try:
        return values.cast(pa.binary()).cast(pa.string())  # who reads parquet takes the writer's word that it is UTF-8
    except pa.ArrowInvalid:
        read = (cell and cell.decode(errors="surrogateescape") for cell in values.cast(pa.binary()).to_pylist())
        cells = enumerate(read, start=rows_before)
        return pa.array([_stored(file, place, name, cell) for place, cell in cells], pa.string())


def _not_text(file: UserFile, name: str, kind: pa.DataType) -> InputError:
    return InputError(f"the column {name} of {file} is of type {kind}; write it as text.")


def _counts(file: UserFile, rows_before: int, name: str, texts: pa.Array) -> pa.Array:
    return pa.array(
        [_count(file, place, name, text) for place, text in enumerate(texts.to_pylist(), start=rows_before)], pa.int64()
    )


def _count(file: UserFile, place: int, name: str, text: str | None) -> int | None:
    if text is None or text.strip().casefold() in _GAPS:
        return None
    with suppress(InvalidOperation):  # what is no number at all
        number = Decimal(text)
        if number == number.to_integral_value() and 0 <= number <= _MAX_COUNT:
            return int(number)
    raise InputError(
        f"{file.row(place)} has the {name} {text!r}, which is no whole number from 0 on; correct it, or leave it empty."
    )
