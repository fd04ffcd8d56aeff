"""Second copies of tombstones: what keeps forgotten videos out must not hang on one file of the ledger.

A tombstone and its proof stand in two commits, but small files of the ledger are merged. So each is written to
`STORE/forgotten/` too, before it is committed. A repair of the ledger takes from there what a damaged file held.
"""

import io
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longvlm.pipeline.store import lease
from longvlm.pipeline.store.files import conformed, filesystem
from longvlm.pipeline.store.health import DamagedError, reading
from longvlm.schemas import tables


def copy_tombstones(store_uri: str, tombstones: pa.Table) -> None:
    """Write a copy of tombstones.

    Args:
        store_uri: of the store.
        tombstones: rows of tables.VIDEOS; `seq` is the moment of the copy, before that of the commit.
    """
    if tombstones.num_rows:
        sink = io.BytesIO()
        pq.write_table(tombstones, sink, write_page_checksum=True)
        lease.create(f"{_folder(store_uri)}/{uuid.uuid4()}.parquet", sink.getvalue())


def read_copies(store_uri: str) -> tuple[pa.Table, dict[str, str]]:
    """All tombstones that were copied, and the copies that are damaged: uri -> what is wrong.

    Raises:
        OSError: the store is out of reach.
    """
    found, damaged = [tables.VIDEOS.empty_table()], {}
    for uri in _copies(store_uri):
        fs, path = filesystem(uri)
        content = fs.cat_file(path)
        try:
            found.append(conformed(_read(uri, content), tables.VIDEOS))
        except DamagedError as error:
            damaged[uri] = error.reason
    return pa.concat_tables(found), damaged


def remove_copy(uri: str) -> None:
    """Remove a copy, which is damaged."""
    fs, path = filesystem(uri)
    fs.rm_file(path)


def _read(uri: str, content: bytes) -> pa.Table:
    """The rows of a copy. Raises DamagedError where it is not what was written."""
    with reading(uri):
        rows = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
        rows.validate(full=True)
        found = {field.name: field.type for field in rows.schema}
    for name in tables.VIDEOS.names:
        if name in found and found[name] != tables.VIDEOS.field(name).type:
            raise DamagedError(uri, f"its column {name} is of type {found[name]}")
    return rows


def _folder(store_uri: str) -> str:
    return f"{store_uri}/forgotten"


def _copies(store_uri: str) -> list[str]:
    fs, path = filesystem(_folder(store_uri))
    fs.invalidate_cache()
    try:
        found: list[Any] = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = [name.rpartition("/")[2] for name in found]
    return [f"{_folder(store_uri)}/{name}" for name in sorted(names) if name.endswith(".parquet")]
