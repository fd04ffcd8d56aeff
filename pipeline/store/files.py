"""Closed parquet files: where they lie, how they are laid out, and what Delta's log says of them."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import InputError

_PROTOCOLS = {"file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # both fsspec and deltalake speak them
_STATISTICS = ("video_id", "recipe", "write_id", "segment", "seq")  # what planners prune by
_CUT_BYTES = 4 << 20  # a row group ends at the first video boundary after this ...
_MAX_GROUP_BYTES = 8 << 20  # ... and before this in any case; a row (one segment) is never split


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
    if not is_local(store_uri):
        filesystem(store_uri)  # says now if the library for it is missing
        return store_uri.rstrip("/")
    return os.path.abspath(filesystem(store_uri)[1])  # noqa: PTH100 - a string, as for every other address


def is_local(uri: str) -> bool:
    """Whether a path or URL is on this machine's own file system."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL and the path in it. InputError where its library is missing."""
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        extra = "gcs" if uri.startswith("g") else "s3"
        raise InputError(f"{uri} needs a library: {error}; pip install 'longvlm-index[{extra}]'.") from error


def write_parquet(store_uri: str, table: str, rows: pa.Table) -> dict[str, Any]:
    """Write rows as one closed parquet file of a table, under a name nobody can guess, and describe it.

    Ids and enums are dictionary-encoded with statistics; blobs and lists stand plain, uncompressed and without
    statistics. A local file is on the disk (fsync) when this returns. Nobody sees the file before Delta's log names it.

    Returns:
        The fields of `tables.SHARD`.

    Raises:
        OSError: the disk is full, read-only or out of reach; what was written is removed again.
    """
    fs, root = filesystem(store_uri)
    name = f"{uuid.uuid4()}.parquet"
    path = f"{root}/{table}/{name}"
    plain = [field.name for field in rows.schema if _is_blob(field.type)]
    encoded = [column for column in rows.column_names if column not in plain]
    try:
        with fs.open(path, "wb") as sink:
            with pq.ParquetWriter(
                sink,
                rows.schema,
                use_dictionary=encoded,
                write_statistics=encoded,
                compression=dict.fromkeys(encoded, "zstd"),
            ) as writer:
                for start, end in _row_groups(rows, plain):
                    writer.write_table(rows.slice(start, end - start), row_group_size=end - start)
            num_bytes = sink.tell()
            if is_local(store_uri):
                sink.flush()
                os.fsync(sink.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell; an unnamed leftover harms nobody
            fs.rm_file(path)
        raise
    if is_local(store_uri):
        _sync_folder(f"{root}/{table}")
    return {"path": name, "size_bytes": num_bytes, "stats": json.dumps(_statistics(rows))}


def _is_blob(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_nested(kind)


def _row_groups(rows: pa.Table, blobs: list[str]) -> Iterator[tuple[int, int]]:
    """Row ranges of 4-8 MB, cut between videos where possible."""
    num_bytes = pa.chunked_array([pa.repeat(pa.scalar(64, pa.int64()), rows.num_rows)])  # the plain columns, about
    for name in blobs:
        column = rows[name]
        lengths = pc.binary_length(column) if pa.types.is_binary(column.type) else pc.list_value_length(column)
        width = 1 if pa.types.is_binary(column.type) else 8
        num_bytes = pc.add(num_bytes, pc.multiply(pc.fill_null(lengths, 0).cast(pa.int64()), width))
    write_ids = rows["write_id"].to_pylist() if "write_id" in rows.column_names else [None] * rows.num_rows
    start, group_bytes = 0, 0
    for row, row_bytes in enumerate(num_bytes.to_pylist()):
        at_boundary = row > 0 and write_ids[row] != write_ids[row - 1]
        if row > start and (group_bytes + row_bytes > _MAX_GROUP_BYTES or (at_boundary and group_bytes >= _CUT_BYTES)):
            yield start, row
            start, group_bytes = row, 0
        group_bytes += row_bytes
    yield start, rows.num_rows


def _statistics(rows: pa.Table) -> dict[str, Any]:
    """A file's statistics in Delta's words (Delta protocol, "Per-file Statistics")."""
    columns = [name for name in _STATISTICS if name in rows.column_names]
    ranges = {name: pc.min_max(rows[name]).as_py() for name in columns}
    return {
        "numRecords": rows.num_rows,
        "minValues": {name: span["min"] for name, span in ranges.items() if span["min"] is not None},
        "maxValues": {name: span["max"] for name, span in ranges.items() if span["max"] is not None},
        "nullCount": {name: rows[name].null_count for name in columns},
    }


def _sync_folder(path: str) -> None:
    """Make a new name in a folder outlive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
