"""`index.duckdb`: the views of a local store in a file, for people and tools that open DuckDB files."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

from duckdb import DuckDBPyConnection

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas.sql_text import quoted


def write_index_duckdb(store_uri: str, snapshot: Snapshot) -> Path | None:
    """Put the snapshot's views into `index.duckdb` in a local store, replacing the one before at once.

    A convenience, never authoritative. Of a remote store nothing is written, and None returned: its views would need an
    extension and credentials wherever the file is opened.

    Raises:
        InputError: as `catalog.connect`.
    """
    if not is_local(store_uri):
        return None
    target = Path(store_uri) / "index.duckdb"
    draft = target.with_name(f".index-{uuid.uuid4()}.duckdb")
    try:
        draft.write_bytes(_of_no_rows())
        with _attached(draft) as con:
            catalog.create_views(con, snapshot, (), "CREATE OR REPLACE")
            if snapshot.table("answers").files:
                con.execute(f"CREATE OR REPLACE VIEW answers_wide AS {catalog.answers_wide(con)}")
        os.replace(draft, target)  # noqa: PTH105 - says best what it does
    finally:
        draft.unlink(missing_ok=True)
        draft.with_name(f"{draft.name}.wal").unlink(missing_ok=True)  # of a draft that a full disk broke off
    return target


@cache
def _of_no_rows() -> bytes:
    """The file of a store without rows, which any other's differs from in its tables alone.

    DuckDB binds a view as it is made, with all that it stands on, which takes longer than the rest of a small job.
    """
    with tempfile.TemporaryDirectory(prefix="longvlm-") as scratch:
        path = Path(scratch, "index.duckdb")
        with _attached(path) as con:
            catalog.create_views(con, Snapshot(), None, "CREATE")
        return path.read_bytes()


@contextmanager
def _attached(path: Path) -> Iterator[DuckDBPyConnection]:
    """A connection that makes its views in a file; what is in it is whole at the end."""
    name = f"index_{uuid.uuid4().hex}"  # another thread may have one attached
    with _database(os.getpid()).cursor() as con, reachable(path) as taken:
        try:
            # the storage version lets older DuckDBs open the file
            con.execute(f"ATTACH {quoted(taken)} AS {name} (STORAGE_VERSION 'v1.0.0'); USE {name}")
            yield con
            con.execute(f"USE memory; DETACH {name}")
        except BaseException:
            _database.cache_clear()  # it may be broken, and holds the file open
            raise


@lru_cache(1)
def _database(_pid: int) -> DuckDBPyConnection:
    """What files are attached to: to make one for each takes longer than to make its views; none survives a fork."""
    con = catalog.without_views(Snapshot(), apart=True)
    con.execute("SET enable_external_file_cache = false")  # it outlives the job, and files may be damaged meanwhile
    return con


@contextmanager
def reachable(database: Path) -> Iterator[str]:
    """A path by which DuckDB opens a database file: what it takes for slashes, the backslashes of a folder, is not."""
    if "\\" not in str(database.parent):
        yield str(database)
        return
    with tempfile.TemporaryDirectory(prefix="longvlm-") as scratch:
        folder = Path(scratch, "folder")
        folder.symlink_to(database.parent)
        yield str(folder / database.name)
