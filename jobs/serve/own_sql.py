"""Somebody's own SQL: each query in a process of its own, which is ended where it takes too long or too much memory.

DuckDB does not count the memory of values, and one may be of gigabytes, so that no limit within the server would hold.
"""

import csv
import io
import json
import resource
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.query.sql import sealed_store
from longvlm.jobs.serve.pinned import PinnedStore, Row, waiting
from longvlm.pipeline.confine import isolated_python
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import rows
from longvlm.pipeline.store.query.search import sql_of_segments
from longvlm.schemas.errors import InputError

_TOO_MUCH = f"the result is larger than {SERVE.file_bytes >> 20} MB; select less, or use `longvlm sql`."
_TOO_LONG = f"the query was ended after {SERVE.sql_s:.0f} s; ask for less."
_NO_ROOM = "the query took too much memory and was ended; ask for less."
_BATCH_ROWS = 2048  # of parquet; a batch is measured before it is kept
_MAX_CELL = 2000  # characters of a value on the page
_WRONG = 2  # exit code of the child: what it wrote is a sentence
_turns = threading.BoundedSemaphore(SERVE.sql_at_once)
_CHILD = "from longvlm.jobs.serve.own_sql import answer; answer(sys.argv[1])"


@dataclass(frozen=True)
class SqlResult:
    """The first rows of a query, as text."""

    columns: list[str]
    rows: list[list[str | None]]
    is_cut: bool  # whether there are more rows

    @property
    def write_id(self) -> int | None:
        """The column that names videos."""
        return self.columns.index("write_id") if "write_id" in self.columns else None


def run_own(pinned: PinnedStore, sql: str) -> SqlResult:
    """The first rows of one SELECT, for a page. Raises InputError where it cannot run, or takes too much."""
    told = json.loads(run_as(pinned, sql, "table"))
    return SqlResult(told["columns"], told["rows"][: SERVE.sql_rows], len(told["rows"]) > SERVE.sql_rows)


def rows_of_own(pinned: PinnedStore, sql: str, values: Row) -> list[Row]:
    """Rows of a query that holds somebody's own predicate: texts, numbers and booleans by name. Raises as `run_own`."""
    found: list[Row] = json.loads(run_as(pinned, sql, "rows", values))
    return found


def segments_of_own(pinned: PinnedStore, where: str) -> pa.Table:
    """The segments for which somebody's own predicate holds, as `segments_where` gives them. Raises as `run_own`."""
    return pq.read_table(io.BytesIO(run_as(pinned, sql_of_segments(where), "whole")))


def run_as(pinned: PinnedStore, sql: str, form: str, values: Row | None = None) -> bytes:
    """The rows of one SELECT as table, csv, parquet or rows, at most `SERVE.file_rows`; whole is parquet of all.

    Raises:
        InputError: it cannot run, or takes too long, too much memory or too much room.
        BusyError: other queries run already.
    """
    asked = json.dumps({"sql": sql, "form": form, "values": values or {}, "made": pinned.copies()}).encode()
    command = isolated_python(_CHILD, pinned.store_uri)
    try:
        with waiting(_turns):
            done = subprocess.run(command, input=asked, capture_output=True, timeout=SERVE.sql_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise InputError(_TOO_LONG) from error
    if done.returncode == _WRONG:
        raise InputError(done.stdout.decode())
    if done.returncode:  # killed, or out of memory where nothing could say so
        raise InputError(_NO_ROOM)
    return done.stdout


# --- in the child ---


def answer(store_uri: str) -> None:
    """Answer the query on standard input on standard output, and end."""
    resource.setrlimit(resource.RLIMIT_DATA, (SERVE.sql_bytes, SERVE.sql_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (int(4 * SERVE.sql_s),) * 2)  # where nobody is left to end it
    asked = json.load(sys.stdin)
    try:
        with sealed_store(store_uri, made=asked["made"]) as con, catalog.queries_as_sentences():
            found = _WRITERS[asked["form"]](con, asked["sql"], asked["values"])
    except (InputError, MemoryError, duckdb.OutOfMemoryException) as error:
        is_told = isinstance(error, InputError) and not isinstance(error.__cause__, duckdb.OutOfMemoryException)
        sys.stdout.buffer.write((str(error) if is_told else _NO_ROOM).encode())
        sys.exit(_WRONG)
    sys.stdout.buffer.write(found)


def _table(con: duckdb.DuckDBPyConnection, sql: str, _: Row) -> bytes:
    relation = catalog.select(con, sql)
    few = rows.without_blobs(relation).limit(SERVE.sql_rows + 1)
    found = [[_short(cell) for cell in row] for row in rows.text_rows(con, few)]
    return json.dumps({"columns": relation.columns, "rows": found}).encode()


def _short(cell: str | None) -> str | None:
    return cell if cell is None or len(cell) <= _MAX_CELL else f"{cell[:_MAX_CELL]} ..."


def _csv(con: duckdb.DuckDBPyConnection, sql: str, _: Row) -> bytes:
    """With a header; null is an empty cell."""
    relation, written = catalog.select(con, sql), io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(relation.columns)
    for row in rows.text_rows(con, relation.limit(SERVE.file_rows)):
        writer.writerow(row)
        if written.tell() > SERVE.file_bytes:
            raise InputError(_TOO_MUCH)
    return written.getvalue().encode()


def _parquet(con: duckdb.DuckDBPyConnection, sql: str, _: Row) -> bytes:
    return _as_parquet(catalog.select(con, sql).limit(SERVE.file_rows))


def _whole(con: duckdb.DuckDBPyConnection, sql: str, _: Row) -> bytes:
    return _as_parquet(catalog.select(con, sql))


def _as_parquet(relation: duckdb.DuckDBPyRelation) -> bytes:
    batches, written, size = relation.to_arrow_reader(_BATCH_ROWS), io.BytesIO(), 0
    try:
        with pq.ParquetWriter(written, batches.schema) as writer:
            for batch in batches:
                size += batch.nbytes
                if size > SERVE.file_bytes:
                    raise InputError(_TOO_MUCH)
                writer.write_batch(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError("parquet has no type for one of these columns; download CSV instead.") from error
    return written.getvalue()


def _rows(con: duckdb.DuckDBPyConnection, sql: str, values: Row) -> bytes:
    catalog.check_select(con, sql)
    con.execute(sql, values)
    names = [column[0] for column in con.description or ()]
    found: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in con.fetchmany(SERVE.sql_rows)]
    return json.dumps(found, default=str).encode()


_WRITERS = {"table": _table, "csv": _csv, "parquet": _parquet, "whole": _whole, "rows": _rows}
