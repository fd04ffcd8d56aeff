"""Rows of a query as text: lines of JSON for machines, cells for whoever lays out a table.

DuckDB itself writes the values, since Python has no word for many of them: a year before the first or after the
9999th, infinity among times, the months of an interval. Rows come a batch at a time, so that there may be any number.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import duckdb

from longvlm.schemas.sql_text import identifier, quoted

_BATCH_ROWS = 2048
_STRING_OR_NO_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def json_lines(con: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation) -> Iterator[str]:
    """Each row as a JSON object, in ASCII.

    Numbers, booleans, lists, structs and JSON are what they are; NaN and infinities, which JSON has no number for, are
    null; blobs are base64; all else is DuckDB's text for it. Of columns that share a name, later ones get a number.

    Args:
        con: the connection that the rows are of.
        rows: from `catalog.select`.

    Raises:
        duckdb.Error: the query fails as it runs.
    """
    for (line,) in _stream(con, f"SELECT to_json(line) FROM (\n{_each(rows, _base64).sql_query()}\n) AS line"):
        text = _STRING_OR_NO_NUMBER.sub(_null, line) if "NaN" in line or "Infinity" in line else line
        yield text if text.isascii() else _NOT_ASCII.sub(_escape, text)


def text_rows(con: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation) -> Iterator[tuple[str | None, ...]]:
    """Each row as DuckDB's texts for its values, and base64 for blobs; arguments and errors as of `json_lines`."""
    return _stream(con, _each(rows, lambda value, kind: f"CAST({_base64(value, kind)} AS VARCHAR)").sql_query())


def without_blobs(rows: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The rows with the size of each blob in its place, so that none has to be held."""
    return _each(
        rows,
        lambda value, kind: f"format('<{{:,}} bytes>', octet_length({value}))" if kind.id == "blob" else value,
    )


def _each(rows: duckdb.DuckDBPyRelation, write: Callable[[str, Any], str]) -> duckdb.DuckDBPyRelation:
    """The rows with every column written anew, by its place, since names may come twice."""
    columns = enumerate(zip(rows.columns, rows.types, strict=True), start=1)
    return rows.project(
        ", ".join(f"{write(f'#{place}', kind)} AS {identifier(name)}" for place, (name, kind) in columns)
    )


def _stream(con: duckdb.DuckDBPyConnection, sql: str) -> Iterator[Any]:
    con.execute(sql)
    while batch := con.fetchmany(_BATCH_ROWS):
        yield from batch


def _base64(value: str, kind: Any, depth: int = 0) -> str:
    """The SQL of a value with the blobs in it as base64, however deep they lie in lists, maps, structs and tuples."""
    if "BLOB" not in str(kind):
        return value
    if kind.id == "blob":
        return f"base64({value})"
    item = f"item{depth}"
    if kind.id in ("list", "array"):
        return f"list_transform({value}, lambda {item}: {_base64(item, dict(kind.children)['child'], depth + 1)})"
    if kind.id == "map":
        parts = ", ".join(f"{name} := {_base64(f'{item}.{name}', part, depth + 1)}" for name, part in kind.children)
        return f"map_from_entries(list_transform(map_entries({value}), lambda {item}: struct_pack({parts})))"
    made = value
    if kind.id == "struct":
        parts = ", ".join(
            f"{identifier(name)} := {_base64(f'struct_extract({value}, {quoted(name)})', part, depth + 1)}"
            for name, part in kind.children
        )
        made = f"CASE WHEN {value} IS NOT NULL THEN struct_pack({parts}) END"
    elif kind.id == "tuple":
        fields = enumerate(kind.children, start=1)
        parts = ", ".join(_base64(f"struct_extract({value}, {place})", part, depth + 1) for place, (_, part) in fields)
        made = f"CASE WHEN {value} IS NOT NULL THEN row({parts}) END"
    return made


def _null(found: re.Match[str]) -> str:
    """A string as it is, and null for what is none."""
    return found[0] if found[0].startswith('"') else "null"


def _escape(found: re.Match[str]) -> str:
    """A character as JSON's escapes, two beyond U+FFFF."""
    units = found[0].encode("utf-16-be")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
