"""Somebody's own SQL over the sealed store: as a table on a page, or as a file of CSV or parquet, within limits."""

import csv
import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.library import PinnedStore, check_one_select
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import rows
from longvlm.schemas.errors import InputError

_TOO_MUCH = f"the result is larger than {SERVE.file_bytes >> 20} MB; select fewer columns, or use `longvlm sql`."
_BATCH_ROWS = 2048  # of parquet; a batch is measured before it is kept
_MAX_CELL = 2000  # characters of a value on the page


@dataclass(frozen=True)
class SqlResult:
    """The first rows of a query, as text."""

    columns: list[str]
    rows: list[list[str | None]]
    is_cut: bool  # whether there are more rows
    write_id: int | None  # the column that names videos


def run_own(pinned: PinnedStore, sql: str) -> SqlResult:
    """The first rows of a query, for a page. Raises InputError where it cannot run, or says too much."""
    with pinned.cursor(SERVE.sql_s) as cursor:
        check_one_select(cursor, sql)
        relation = catalog.select(cursor, sql)
        found: list[list[str | None]] = []
        size = 0
        for row in rows.text_rows(cursor, rows.without_blobs(relation).limit(SERVE.sql_rows + 1)):
            size += sum(len(cell or "") for cell in row)
            if size > SERVE.file_bytes:
                raise InputError(_TOO_MUCH)
            found.append(
                [cell if cell is None or len(cell) <= _MAX_CELL else f"{cell[:_MAX_CELL]} ..." for cell in row]
            )
        columns = relation.columns
    write_id = columns.index("write_id") if "write_id" in columns else None
    return SqlResult(columns, found[: SERVE.sql_rows], len(found) > SERVE.sql_rows, write_id)


def as_csv(pinned: PinnedStore, sql: str) -> bytes:
    """A query's rows as CSV, at most `SERVE.file_rows`; null is an empty cell. Raises as `run_own`."""
    written = io.StringIO()
    with pinned.cursor(SERVE.sql_s) as cursor:
        check_one_select(cursor, sql)
        relation = catalog.select(cursor, sql)
        writer = csv.writer(written, lineterminator="\n")
        writer.writerow(relation.columns)
        for row in rows.text_rows(cursor, relation.limit(SERVE.file_rows)):
            writer.writerow(row)
            if written.tell() > SERVE.file_bytes:
                raise InputError(_TOO_MUCH)
    return written.getvalue().encode()


def as_parquet(pinned: PinnedStore, sql: str) -> bytes:
    """A query's rows as parquet, at most `SERVE.file_rows`. Raises as `run_own`."""
    written = io.BytesIO()
    with pinned.cursor(SERVE.sql_s) as cursor:
        check_one_select(cursor, sql)
        batches = catalog.select(cursor, sql).limit(SERVE.file_rows).to_arrow_reader(_BATCH_ROWS)
        size = 0
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
