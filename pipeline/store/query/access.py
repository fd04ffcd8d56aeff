"""What SQL of a user's own may reach: the files of a store, and inputs that were named; nothing is ever written.

DuckDB reads any file and any address that its process may, in every function that takes a path. So a connection is
sealed before somebody's query or predicate runs in it: it opens nothing any more but the files of its views.
"""

import re
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb

from longvlm.pipeline.store.catalog import first_line
from longvlm.pipeline.store.files import filesystem
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import identifier, quoted

_READERS = {
    ".parquet": "read_parquet",
    ".csv": "read_csv",
    ".tsv": "read_csv",
    ".json": "read_json",
    ".jsonl": "read_json",
    ".ndjson": "read_json",
}
_DATABASES = (".duckdb", ".db")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAKEN = """
    SELECT view_name FROM duckdb_views() UNION SELECT database_name FROM duckdb_databases()
    UNION SELECT schema_name FROM duckdb_schemas()
    UNION SELECT keyword_name FROM duckdb_keywords() WHERE keyword_category = 'reserved'
"""


def attach(con: duckdb.DuckDBPyConnection, inputs: Iterable[str]) -> list[str]:
    """Admit files to a connection before it is sealed, each given as NAME=FILE; returns their addresses.

    A parquet, CSV or JSON file becomes the view NAME, a DuckDB file the read-only database NAME. Files lie on this
    machine or wherever fsspec reaches.

    Raises:
        InputError: the name is no identifier or taken, or the file is not there, not readable, or of another kind.
    """
    addresses = []
    for given in inputs:
        name, equals, address = given.partition("=")
        if not equals or not address or not _NAME.fullmatch(name):
            raise InputError(f"cannot attach {given!r}: write NAME=FILE, the name of letters, digits and underscores.")
        if name.casefold() in {taken.casefold() for (taken,) in con.execute(_TAKEN).fetchall()}:
            raise InputError(f"cannot attach {given!r}: the name {name} is taken; choose another.")
        addresses.append(_attach(con, name, address))
    return addresses


def seal(con: duckdb.DuckDBPyConnection, snapshot: Snapshot, also: Iterable[str] = ()) -> None:
    """Close a connection that `catalog.connect` made apart to all files but those of the snapshot and `also`; for good.

    Files are named one by one, because into a folder that is allowed DuckDB would also write. What does not fit into
    memory goes to a new folder of this connection's own, which DuckDB removes at the end; set a limit before.
    """
    allowed = {file.uri for table in snapshot.tables.values() for file in table.files} | set(also)
    for uri in [uri for uri in allowed if not is_local(uri)]:
        fs, path = filesystem(uri)
        allowed.add(fs.unstrip_protocol(path))  # DuckDB opens s3a://bucket/x as s3://bucket/x
    scratch = Path(tempfile.gettempdir()) / f"longvlm-sql-{uuid.uuid4()}"
    con.execute(f"SET temp_directory = {quoted(str(scratch))}")
    con.execute(f"SET allowed_paths = [{', '.join(quoted(uri) for uri in sorted(allowed))}]")
    con.execute("SET allowed_configs = ['disabled_optimizers']")  # which the search sets around one query of its own
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")


def _attach(con: duckdb.DuckDBPyConnection, name: str, address: str) -> str:
    """Admit one file under a name that is free; returns its address in the one form that is used from here on."""
    suffix = Path(address.removesuffix(".gz")).suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None and suffix not in _DATABASES:
        kinds = ", ".join([*_READERS, *_DATABASES])
        raise InputError(f"cannot attach {address}: its name must end in one of {kinds}.")
    if set(address) & set("*?["):
        raise InputError(f"cannot attach {address}: *, ? and [ are taken for a pattern; name one file without them.")
    if reader is None and not is_local(address):
        raise InputError(f"cannot attach {address}: DuckDB opens a database on this machine only; copy it here first.")
    try:
        address, is_there = _reach(con, address)
        if not is_there:
            raise InputError(f"cannot attach {address}: there is no such file; check the address.")
        if reader is None:
            con.execute(f"ATTACH {quoted(address)} AS {identifier(name)} (TYPE duckdb, READ_ONLY)")
        else:
            con.execute(f"CREATE VIEW {identifier(name)} AS FROM {reader}({quoted(address)})")
    except (duckdb.Error, OSError, ValueError) as error:
        raise InputError(f"cannot attach {address}: {first_line(error)}; check the file.") from error
    return address


def _reach(con: duckdb.DuckDBPyConnection, address: str) -> tuple[str, bool]:
    """Let DuckDB reach a file's protocol; returns the address as DuckDB will say it, and whether a file is there."""
    if is_local(address):
        path = Path(address.removeprefix("file://")).expanduser().absolute()
        return str(path), path.is_file()
    fs: Any
    fs, remote = filesystem(address)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & set(con.list_filesystems()):
        con.register_filesystem(fs)
    return str(fs.unstrip_protocol(remote)), bool(fs.isfile(remote))
