"""Closed parquet files: where they lie, how they are laid out, and what Delta's log says of them."""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longvlm.pipeline.uris import is_local, local_path, locate
from longvlm.pipeline.visible import escaped_bytes, is_utf8
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import FIRST_COLUMNS

_PROTOCOLS = {"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # both fsspec and deltalake speak them
UNSPEAKABLE = re.compile(r"[%\\\x00-\x1f\x7f]")  # what delta-rs decodes twice, takes for a slash, or refuses in a path
_STATISTICS = ("video_id", "recipe", "write_id", "segment", "seq")  # what planners prune by
_MAX_GROUP_BYTES = 8 << 20  # of a row group; a row (one segment) is never split
# Tokens are read a video at a time, and a row group is the least that can be read: a video has its own, and only very
# small ones share. More groups cost little: 1.1 kB of footer, which is read with every video, and 0.1 ms each. Of
# segments the embeddings may be read so, but all of them are scanned by searches, which like larger groups.
_MAX_SHARED_BYTES = {"tokens": 192 << 10, "segments": 1 << 20}


def canonical(store_uri: str) -> str:
    """A store's address as everything else uses it: an absolute path, or a URL without a trailing slash.

    Raises InputError for an address where no store can be.
    """
    protocol = store_uri.partition("://")[0] if "://" in store_uri else "file"
    if protocol not in _PROTOCOLS:
        raise InputError(f"a store cannot be at {store_uri}; use a folder or an s3://, gs:// or az:// address.")
    if set(store_uri) & set("*?["):
        raise InputError(
            f"the store's address {store_uri} has a *, ? or [ in it, which SQL readers take for a pattern."
        )
    if not is_utf8(store_uri):
        raise InputError(f"the store's address {escaped_bytes(store_uri)} is not UTF-8; choose another folder.")
    if not is_local(store_uri):
        if UNSPEAKABLE.search(store_uri):
            raise InputError(
                f"the store's address {store_uri} has a %, a backslash or a control character in it, which readers of "
                "Delta tables take for something else in a bucket; choose another prefix."
            )
        filesystem(store_uri)  # says now if the library for it is missing
        return store_uri.rstrip("/")
    return local_path(store_uri)


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL and the path in it. InputError where its library is missing."""
    if is_local(uri):
        return locate(uri)  # a path may have "::" in it, which fsspec alone takes for a chain of filesystems
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        extra = {"g": "gcs", "a": "azure"}.get(uri[0], "s3")
        raise InputError(f"{uri} needs a library: {error}; pip install 'longvlm-index[{extra}]'.") from error


def write_parquet(store_uri: str, table: str, rows: pa.Table) -> dict[str, Any]:
    """Write rows as one closed parquet file of a table, under a name nobody can guess, and describe it.

    Ids and enums are dictionary-encoded with statistics; blobs and lists stand plain, uncompressed and without
    statistics. Row groups of `tokens` follow the videos, so that one is read without its neighbours; their ids
    are uncompressed too, because setting up zstd for a dozen rows takes longer than reading the blobs. A local file is
    on the disk (fsync) when this returns. Nobody sees the file before Delta's log names it.

    Returns:
        The fields of `tables.SHARD`.

    Raises:
        OSError: the disk is full, read-only or out of reach; what was written is removed again.
    """
    return write_pieces(store_uri, table, rows.schema, [rows])


def write_pieces(store_uri: str, table: str, schema: pa.Schema, pieces: Iterable[pa.Table]) -> dict[str, Any]:
    """As `write_parquet`, of rows that come piece by piece: no more than one is in memory."""
    fs, root = filesystem(store_uri)
    name = f"{uuid.uuid4()}.{len(schema)}.parquet"
    path = f"{root}/{table}/{name}"
    plain = [field.name for field in schema if _is_blob(field.type)]
    encoded = [column for column in schema.names if column not in plain]
    max_shared = _MAX_SHARED_BYTES.get(table, _MAX_GROUP_BYTES)
    spans = _Spans(schema)
    try:
        with fs.open(path, "wb") as sink:
            with pq.ParquetWriter(
                sink,
                schema,
                use_dictionary=encoded,
                write_statistics=encoded,
                compression={} if table == "tokens" else dict.fromkeys(encoded, "zstd"),
                write_page_checksum=True,  # for `longvlm maintain --verify`
            ) as writer:
                for rows in pieces:
                    for start, end in _row_groups(rows, _row_bytes(rows, plain), max_shared):
                        writer.write_table(rows.slice(start, end - start), row_group_size=end - start)
                    spans.add(rows)
            num_bytes = sink.tell()
            if is_local(store_uri):
                sink.flush()
                os.fsync(sink.fileno())
    except BaseException:  # of the disk, or of what the pieces are read from: half a file is of no use
        with contextlib.suppress(OSError):  # the first error is the one to tell; an unnamed leftover harms nobody
            fs.rm_file(path)
        raise
    if is_local(store_uri):
        _sync_folder(f"{root}/{table}")
    return {"path": name, "size_bytes": num_bytes, "stats": json.dumps(spans.as_json())}


def remove_files(table_uri: str, paths: Iterable[str]) -> list[str]:
    """Remove files of a table that no log names; returns those that were there."""
    fs, root = filesystem(table_uri)
    removed = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another one is at it too
            fs.rm_file(f"{root}/{path}")
            removed.append(path)
    return removed


def files_on_disk(table_uri: str) -> dict[str, int]:
    """Every parquet file in the folder of a table, named by its log or not, with its bytes."""
    fs, root = filesystem(table_uri)
    found = {info["name"].rpartition("/")[2]: info["size"] for info in fs.ls(root, detail=True, refresh=True)}
    return {name: num_bytes for name, num_bytes in found.items() if name.endswith(".parquet")}


def num_columns(table: str, uri: str) -> int:
    """How many of its table's columns a file has, the first ones, by its name alone: nobody has to open it for that.

    The files of 0.1.0 do not say it in their names, and have as many as there were then.
    """
    said = re.search(r"\.(\d+)\.parquet$", uri)
    return int(said[1]) if said else FIRST_COLUMNS[table]


def conformed(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Rows of a file in the columns of a schema; those that were added since it was written are null."""
    if rows.schema.equals(schema):
        return rows
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _is_blob(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_nested(kind)


def _row_bytes(rows: pa.Table, blobs: list[str]) -> list[int]:
    """What each row takes, about."""
    num_bytes = pa.chunked_array([pa.repeat(pa.scalar(64, pa.int64()), rows.num_rows)])  # the plain columns
    for name in blobs:
        column = rows[name]
        lengths = pc.binary_length(column) if pa.types.is_binary(column.type) else pc.list_value_length(column)
        width = 1 if pa.types.is_binary(column.type) else 8
        num_bytes = pc.add(num_bytes, pc.multiply(pc.fill_null(lengths, 0).cast(pa.int64()), width))
    return num_bytes.to_pylist()


def _row_groups(rows: pa.Table, row_bytes: list[int], max_shared: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole videos while these fit into `max_shared` bytes, else of one video or of 8 MB of it."""
    write_ids = rows["write_id"].to_pylist() if "write_id" in rows.column_names else [None] * rows.num_rows
    start, group_bytes = 0, 0
    for _, video in groupby(range(rows.num_rows), key=write_ids.__getitem__):
        members = list(video)
        if members[0] > start and group_bytes + sum(row_bytes[row] for row in members) > max_shared:
            yield start, members[0]
            start, group_bytes = members[0], 0
        for row in members:
            if row > start and group_bytes + row_bytes[row] > _MAX_GROUP_BYTES:
                yield start, row
                start, group_bytes = row, 0
            group_bytes += row_bytes[row]
    yield start, rows.num_rows


class _Spans:
    """A file's statistics in Delta's words (Delta protocol, "Per-file Statistics"), as its rows come."""

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self.names = [name for name in _STATISTICS if name in schema.names]
        self.ends: dict[str, list[Any]] = {name: [] for name in self.names}
        self.nulls = dict.fromkeys(self.names, 0)

    def add(self, rows: pa.Table) -> None:
        self.num_rows += rows.num_rows
        for name in self.names:
            ends = [*self.ends[name], *pc.min_max(rows[name]).as_py().values()]
            known = [end for end in ends if end is not None]
            self.ends[name] = [min(known), max(known)] if known else []
            self.nulls[name] += rows[name].null_count

    def as_json(self) -> dict[str, Any]:
        return {
            "numRecords": self.num_rows,
            "minValues": {name: ends[0] for name, ends in self.ends.items() if ends},
            "maxValues": {name: ends[1] for name, ends in self.ends.items() if ends},
            "nullCount": self.nulls,
        }


def _sync_folder(path: str) -> None:
    """Make a new name in a folder outlive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(folder: Path) -> None:
    """Raise InputError where no store can be made in a folder of this machine."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - never raises
    if not existing.is_dir():
        raise InputError(f"the store {folder} cannot be made: {existing} is a file; choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"the store {folder} cannot be written: {existing} is read-only here; choose another folder.")
