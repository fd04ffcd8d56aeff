"""Results of queries in the form that was asked for: DuckDB's own box for a person, or every row and value in full."""

import csv
import io
import itertools
import re
import shutil
import sys
from contextlib import redirect_stdout

import duckdb

from longvlm.jobs.query.sql import bind_script
from longvlm.pipeline.store.query import rows
from longvlm.pipeline.visible import visible
from longvlm.schemas.errors import QueryError

_WIDTH = 120  # characters, where neither a terminal nor COLUMNS says
_SHOWN_ROWS = 40
_BOX, _ASCII_BOX = "─│┌┐└┘├┤┬┴┼…·", "-|+++++++++~."
_ONE_ROW = re.compile(r"^( +)1 rows\b", re.MULTILINE)


def print_results(con: duckdb.DuckDBPyConnection, script: str, form: str) -> None:
    """Run the statements of a script, and print what each returns.

    Args:
        con: a sealed connection.
        script: SQL, one statement or several.
        form: box, csv, markdown, line or json.

    Raises:
        InputError: as `bind_script`; or a statement fails as it runs.
    """
    write = FORMS[form]
    for place, (name, relation) in enumerate(bind_script(con, script)):
        if place and form != "json":
            sys.stdout.write("\n")
        try:
            write(con, relation)
        except duckdb.Error as error:
            said, _, _ = str(error).partition("\n\nLINE ")  # of what was made of the statement
            raise QueryError(f"{name} cannot run: {said}") from error


def _print_box(_: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation) -> None:
    """As DuckDB shows it: the columns and rows that fit, dots, the last ones, and how many there are."""
    shown = io.StringIO()
    with redirect_stdout(shown):
        width = shutil.get_terminal_size((_WIDTH, 0)).columns
        rows.without_blobs(relation).show(max_width=width, max_rows=_SHOWN_ROWS)
    box = visible(_ONE_ROW.sub(r"\g<1>1 row", shown.getvalue().rstrip("\n")), keep="\n")
    try:
        _BOX.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        box = box.translate(str.maketrans(_BOX, _ASCII_BOX))
    sys.stdout.write(f"{box}\n")


def _print_json(con: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation) -> None:
    for line in rows.json_lines(con, relation):
        sys.stdout.write(f"{line}\n")


def _print_csv(con: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation) -> None:
    """With a header; null is an empty cell."""
    writer = csv.writer(_Verbatim(), lineterminator="\n")
    writer.writerow(relation.columns)
    writer.writerows(rows.text_rows(con, relation))


class _Verbatim:
    """A file that is standard output: verbatim where a file or a program gets it, visible where a terminal would."""

    def write(self, text: str) -> None:
        """Write it."""
        sys.stdout.write(visible(text, keep="\n") if sys.stdout.isatty() else text)


def _print_markdown(con: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation) -> None:
    """As a table of Markdown, which has no line breaks within cells; null is an empty one."""
    head = (relation.columns, ["---"] * len(relation.columns))
    for row in itertools.chain(head, rows.text_rows(con, relation)):
        cells = (visible(cell or "", keep="\n").replace("|", r"\|").replace("\n", "<br>") for cell in row)
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def _print_lines(con: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation) -> None:
    """A line a value, whole, with its column before it; an empty one between rows."""
    names = [visible(name) for name in relation.columns]
    width = max(map(len, names))
    for place, row in enumerate(rows.text_rows(con, relation)):
        if place:
            sys.stdout.write("\n")
        for name, value in zip(names, row, strict=True):
            shown = "NULL" if value is None else visible(value, keep="\n")
            sys.stdout.write(f"{name:>{width}} = {shown}\n")


FORMS = {"box": _print_box, "json": _print_json, "csv": _print_csv, "markdown": _print_markdown, "line": _print_lines}
