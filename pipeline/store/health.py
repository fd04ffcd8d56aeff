"""Files that are not what was written: told by their footers and from files out of reach, left out of what is read."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import filesystem, num_columns
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.schemas.sql_text import quoted
from longvlm.schemas.tables import TABLES

_MOST_FILES = 256  # of a table, whose footers are read before anything is asked; more would take too long in a bucket
_AT_ONCE = 16
_PAUSES_S = (0.5, 2.0)  # after a read that failed; the libraries of buckets try some times by themselves
T = TypeVar("T")


class OutOfReachError(OSError):
    """A file that could not be read, which says nothing about its content; the error of the last try is its cause."""


class DamagedError(Exception):
    """A file that is not what was written."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri = uri
        self.reason = reason


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Take whatever the body raises for damage of a file (DamagedError): a flipped bit may make anything of it.

    So the body is pyarrow's alone. A mistake of our own in it would name every file, and a repair would drop them all;
    what judges what was read stands outside, and what it raises beside DamagedError ends the command.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise DamagedError(uri, why_damaged(error)) from error


class TracedFile:
    """A file that is read, and what kept it from being read."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, *args: Any) -> Any:
        """As the file's own."""
        try:
            return self._file.read(*args)
        except Exception as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        """All else is the file's own."""
        return getattr(self._file, name)


def look_into(uri: str, look: Callable[[Any], T]) -> T:
    """What a function makes of an open file; reads that fail are tried again.

    Raises:
        FileNotFoundError: there is none.
        OutOfReachError: reads kept failing.
        Exception: whatever the function raises of the file's content.
    """
    fs, path = filesystem(uri)
    for pause_s in (*_PAUSES_S, None):
        source = None
        try:
            with fs.open(path, "rb") as file:
                source = TracedFile(file)
                return look(source)
        except FileNotFoundError:
            raise
        except Exception as error:
            if source is not None and source.error is None:
                raise
            if pause_s is None:
                cause = error if source is None else source.error or error
                raise OutOfReachError(f"{uri} cannot be read ({why_damaged(cause)})") from cause
        time.sleep(pause_s)
    raise AssertionError


def check_footer(table: str, file: DataFile, parquet: pq.ParquetFile) -> None:
    """Raise DamagedError unless a footer has as many rows as the log says, and the columns of its table."""
    with reading(file.uri):
        num_rows, found = parquet.metadata.num_rows, {field.name: field.type for field in parquet.schema_arrow}
    if num_rows != file.num_rows:
        raise DamagedError(file.uri, f"it has {num_rows} rows, and the log says {file.num_rows}")
    for field in list(TABLES[table])[: num_columns(table, file.uri)]:
        if field.name not in found:
            raise DamagedError(file.uri, f"it lacks the column {field.name}")
        if found[field.name] != field.type:
            raise DamagedError(file.uri, f"its column {field.name} is of type {found[field.name]}")


def damaged_files(snapshot: Snapshot, *, with_statistics: bool = False) -> dict[str, str]:
    """Files of a snapshot whose footers cannot be read or are not theirs: uri -> what is wrong, in words.

    Tables of more files than can be looked at in a moment are not looked at. That DuckDB also takes what footers say of
    each row group is looked at if asked: that takes longer.
    """
    asked = {table: pinned for table, pinned in snapshot.tables.items() if len(pinned.files) <= _MOST_FILES}
    files = [(table, file) for table, pinned in asked.items() for file in pinned.files]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda one: _damage(*one), files)
        damaged = {file.uri: why for (_, file), why in zip(files, found, strict=True) if why}
    what = "parquet_metadata" if with_statistics else "parquet_schema"
    return damaged | _unreadable(without(Snapshot(asked), damaged), what)


def rotten_columns(files: Sequence[DataFile], columns: list[str] | None = None) -> dict[str, str]:
    """Files of which some columns are not what was written, by their pages' checksums: uri -> what is wrong, in words.

    DuckDB does not look at these. What it tells by itself is not told here: files that are gone or have no footer.

    Raises:
        OutOfReachError: a file could not be read.
    """

    def rot(file: DataFile) -> str | None:
        def look(source: Any) -> None:
            try:
                parquet = pq.ParquetFile(source, page_checksum_verification=True)
            except (OSError, pa.ArrowException):
                return
            with reading(file.uri):
                parquet.read(columns, use_threads=False)

        try:
            look_into(file.uri, look)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {file.uri: why for file, why in zip(files, pool.map(rot, files), strict=True) if why}


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


def _unreadable(snapshot: Snapshot, what: str) -> dict[str, str]:
    """Files that DuckDB cannot make anything of, though Arrow could."""
    uris = [file.uri for pinned in snapshot.tables.values() for file in pinned.files]
    with catalog.without_views(snapshot) as con:

        def refusal(some: list[str]) -> str | None:
            try:
                con.execute(f"SELECT count(*) FROM {what}([{', '.join(map(quoted, some))}])").fetchall()
            except duckdb.Error as error:
                return catalog.first_line(error)
            return None

        if not uris or refusal(uris) is None:
            return {}
        return {uri: why for uri in uris if (why := refusal([uri]))}


def _damage(table: str, file: DataFile) -> str | None:
    def look(source: Any) -> None:
        with reading(file.uri):
            parquet = pq.ParquetFile(source)
        check_footer(table, file, parquet)

    try:
        look_into(file.uri, look)
    except FileNotFoundError:
        return "it is gone"
    except DamagedError as error:
        return error.reason
    return None
