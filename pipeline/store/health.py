"""Files that are not what was written: told by their footers, and left out of what is read."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import filesystem, num_columns
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.schemas.tables import TABLES

_MOST_FILES = 256  # of a table, whose footers are read before anything is asked; more would take too long in a bucket
_AT_ONCE = 16


def check_footer(table: str, file: DataFile, parquet: pq.ParquetFile) -> None:
    """Raise pa.ArrowInvalid unless a footer has as many rows as the log says, and the columns of its table."""
    if parquet.metadata.num_rows != file.num_rows:
        raise pa.ArrowInvalid(f"it has {parquet.metadata.num_rows} rows, and the log says {file.num_rows}")
    found = parquet.schema_arrow
    for field in list(TABLES[table])[: num_columns(table, file.uri)]:
        if field.name not in found.names:
            raise pa.ArrowInvalid(f"it lacks the column {field.name}")
        if found.field(field.name).type != field.type:
            raise pa.ArrowInvalid(f"its column {field.name} is of type {found.field(field.name).type}")


def damaged_files(snapshot: Snapshot) -> dict[str, str]:
    """Files of a snapshot whose footers cannot be read or are not theirs: uri -> what is wrong, in words.

    Tables of more files than can be looked at in a moment are not looked at.
    """
    asked = {table: pinned for table, pinned in snapshot.tables.items() if len(pinned.files) <= _MOST_FILES}
    files = [(table, file) for table, pinned in asked.items() for file in pinned.files]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda one: _damage(*one), files)
        damaged = {file.uri: why for (_, file), why in zip(files, found, strict=True) if why}
    return damaged | _unreadable(without(Snapshot(asked), damaged))


def without(snapshot: Snapshot, damaged: Mapping[str, str]) -> Snapshot:
    """The snapshot without its damaged files: what these held counts as missing."""
    return Snapshot(
        {
            table: PinnedTable(pinned.version, tuple(file for file in pinned.files if file.uri not in damaged))
            for table, pinned in snapshot.tables.items()
        }
    )


def why_damaged(error: Exception) -> str:
    """What an error says of a file that could not be read, in a line."""
    return str(error).partition("\n")[0] or type(error).__name__


def _unreadable(snapshot: Snapshot) -> dict[str, str]:
    """Files that DuckDB cannot make anything of, though Arrow could."""
    uris = [file.uri for pinned in snapshot.tables.values() for file in pinned.files]
    with catalog.without_views(snapshot) as con:

        def refusal(some: list[str]) -> str | None:
            try:
                con.execute(f"SELECT count(*) FROM parquet_schema([{', '.join(map(catalog.quoted, some))}])").fetchall()
            except duckdb.Error as error:
                return catalog.first_line(error)
            return None

        if not uris or refusal(uris) is None:
            return {}
        return {uri: why for uri in uris if (why := refusal([uri]))}


def _damage(table: str, file: DataFile) -> str | None:
    fs, path = filesystem(file.uri)
    try:
        with fs.open(path, "rb") as source:
            check_footer(table, file, pq.ParquetFile(source))
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        if error.errno is not None:
            raise  # out of reach, which is not the file's fault
        return why_damaged(error)
    except Exception as error:  # noqa: BLE001 - a flipped bit may make anything of a footer
        return why_damaged(error)
    return None
