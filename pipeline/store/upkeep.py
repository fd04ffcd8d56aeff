"""Upkeep: the many small files that commits leave are merged into few."""

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError

from pipeline.store.files import filesystem, write_parquet
from pipeline.store.ledger import Store
from pipeline.store.snapshot import DataFile
from schemas.tables import TABLES

_MERGED = ("videos", "segments", "answers")  # tokens are large as they come
_SMALL_BYTES = 16 << 20
_TARGET_BYTES = 64 << 20  # read and written in memory
_MIN_FILES = 8  # fewer are not worth a rewrite
_TRIES = 3


def merge_small_files(store: Store) -> dict[str, int]:
    """Merge the small files of `videos`, `segments` and `answers`; meant for the end of a job.

    Every row is kept. Nothing is deleted from the disk, so readers that pinned the store before still find their files.
    Where another writer keeps changing a table it is left as it is until the next job: its small files do no harm.

    Returns:
        How many files were merged away, per table.
    """
    return {table: _merge_table(store, table) for table in _MERGED}


def _merge_table(store: Store, table: str) -> int:
    num_gone = 0
    num_conflicts = 0
    while num_conflicts < _TRIES:
        pinned = store.pin().table(table)
        batch = _next_batch(pinned.files)
        if len(batch) < _MIN_FILES:
            break
        try:
            merged = write_parquet(store.uri, table, _read_sorted(table, batch))
            store.replace_files(table, pinned.version, batch, merged)
        except CommitFailedError:  # another writer came first: start over from what is there now
            num_conflicts += 1
        else:
            num_gone += len(batch) - 1
    return num_gone


def _next_batch(files: tuple[DataFile, ...]) -> list[DataFile]:
    """Small files that make one of about the target's size, smallest first."""
    batch: list[DataFile] = []
    for file in sorted(files, key=lambda file: file.size_bytes):
        if file.size_bytes >= _SMALL_BYTES or sum(f.size_bytes for f in batch) + file.size_bytes > _TARGET_BYTES:
            break
        batch.append(file)
    return batch


def _read_sorted(table: str, files: list[DataFile]) -> pa.Table:
    schema = TABLES[table]
    rows = []
    for file in files:
        fs, path = filesystem(file.uri)
        with fs.open(path, "rb") as source:
            rows.append(pq.read_table(source).select(schema.names).cast(schema))
    keys = [("write_id", "ascending"), *([("segment", "ascending")] if "segment" in schema.names else [])]
    return pa.concat_tables(rows).sort_by(keys)
