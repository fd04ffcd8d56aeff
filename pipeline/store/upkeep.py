"""Upkeep of a store's files: small ones are merged into few, those of mostly dead rows rewritten without them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError

from pipeline.store import catalog
from pipeline.store.files import filesystem, write_parquet
from pipeline.store.ledger import Store
from pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from schemas.tables import TABLES

_MERGED = ("videos", "segments", "answers")  # at the end of each job; tokens are large as they come
_COMPACTED = ("tokens", "segments", "answers")  # whose rows die
_SMALL_BYTES = 16 << 20
_TARGET_BYTES = 64 << 20  # read and written in memory
_MIN_FILES = 8  # fewer are not worth a rewrite
_DEAD_SHARE = 0.5  # of a file's rows, above which it is rewritten: what is copied is less than what is freed
_TRIES = 3

_SHARES = """
SELECT filename FROM read_parquet({files}, filename = true) t LEFT JOIN dead d USING (write_id)
GROUP BY filename HAVING count(d.write_id) > {share} * count(*)
"""


class Rewritten(NamedTuple):
    """What came of a rewrite."""

    num_files: int  # new ones
    num_left_out: int  # rows


def merge_small_files(store: Store) -> dict[str, int]:
    """Merge the small files of `videos`, `segments` and `answers`; meant for the end of a job.

    Every row is kept. Nothing is deleted from the disk, so readers that pinned the store before still find their files.
    Where another writer keeps changing a table it is left as it is until the next job: its small files do no harm.

    Returns:
        How many files were merged away, per table.
    """
    return {table: _until_done(store, table, _small_files) for table in _MERGED}


def compact(store: Store, dead: pa.Array) -> dict[str, int]:
    """Merge small files of all tables, tokens too, and rewrite those of which most rows belong to dead writes.

    Dead rows are left out wherever a file is rewritten, of `videos` none. As with merging, the old files stay on the
    disk until they are vacuumed.

    Args:
        store: opened by this process.
        dead: write ids, as `dead_writes` finds them.

    Returns:
        How many files are fewer, per table.
    """
    fewer = {"videos": _until_done(store, "videos", _small_files)}
    for table in _COMPACTED:
        fewer[table] = _until_done(store, table, partial(_mostly_dead, table, dead), dead)
        fewer[table] += _until_done(store, table, _small_files, dead)
    return fewer


def rewrite(
    store: Store, table: str, version: int, files: Sequence[DataFile], keep: Callable[[pa.Table], pa.Table]
) -> Rewritten:
    """Put new files in the place of some, with the rows that `keep` returns of each row group, in the usual layout.

    No more than about 64 MB of rows are in memory at a time.

    Raises:
        CommitFailedError: another writer changed the table since the version.
    """
    new = []
    num_rows = 0
    for rows in _chunks(table, files, keep):
        new.append(write_parquet(store.uri, table, rows))
        num_rows += len(rows)
    store.replace_files(table, version, files, new)
    return Rewritten(len(new), sum(file.num_rows for file in files) - num_rows)


def _until_done(
    store: Store,
    table: str,
    choose: Callable[[tuple[DataFile, ...]], list[DataFile]],
    dead: pa.Array | None = None,
) -> int:
    """Rewrite batches of files as long as `choose` finds any; returns how many files there are fewer."""
    num_gone = 0
    num_conflicts = 0
    while num_conflicts < _TRIES:
        pinned = store.pin((table,)).table(table)
        batch = choose(pinned.files)
        if not batch:
            break
        try:
            num_gone += len(batch) - rewrite(store, table, pinned.version, batch, _without(dead)).num_files
        except CommitFailedError:  # another writer came first: start over from what is there now
            num_conflicts += 1
    return num_gone


def _without(dead: pa.Array | None) -> Callable[[pa.Table], pa.Table]:
    if dead is None or not len(dead):
        return lambda rows: rows
    return lambda rows: rows.filter(pc.invert(pc.is_in(rows["write_id"], dead)))


def _small_files(files: tuple[DataFile, ...]) -> list[DataFile]:
    """Small files that make one of about the target's size, smallest first."""
    batch: list[DataFile] = []
    num_bytes = 0
    for file in sorted(files, key=lambda file: file.size_bytes):
        if file.size_bytes >= _SMALL_BYTES or num_bytes + file.size_bytes > _TARGET_BYTES:
            break
        batch.append(file)
        num_bytes += file.size_bytes
    return batch if len(batch) >= _MIN_FILES else []


def _mostly_dead(table: str, dead: pa.Array, files: tuple[DataFile, ...]) -> list[DataFile]:
    """Files of which most rows are dead, until the target's size of rows is left of them; the log rules most out."""
    candidates = Snapshot({table: PinnedTable(0, files)}).files_for(table, dead.to_pylist())
    if not candidates:
        return []
    with catalog.connect(Snapshot({table: PinnedTable(0, tuple(candidates))})) as con:
        con.register("dead", pa.table({"write_id": dead}))
        sql = _SHARES.format(files=[file.uri for file in candidates], share=_DEAD_SHARE)
        mostly = {uri for (uri,) in con.execute(sql).fetchall()}
    batch: list[DataFile] = []
    for file in candidates:
        if file.uri in mostly and (not batch or sum(f.size_bytes for f in batch) * _DEAD_SHARE < _TARGET_BYTES):
            batch.append(file)
    return batch


def _chunks(table: str, files: Sequence[DataFile], keep: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """The rows that are kept, in tables of about the target's size, each ordered by write id and segment."""
    schema = TABLES[table]
    keys = [(name, "ascending") for name in ("write_id", "segment") if name in schema.names]
    held: list[pa.Table] = []
    for file in files:
        fs, path = filesystem(file.uri)
        with fs.open(path, "rb") as source:
            parquet = pq.ParquetFile(source)
            for group in range(parquet.num_row_groups):
                held.append(keep(parquet.read_row_group(group).select(schema.names).cast(schema)))
                if sum(rows.nbytes for rows in held) > _TARGET_BYTES:
                    yield pa.concat_tables(held).sort_by(keys)
                    held.clear()
    if any(len(rows) for rows in held):
        yield pa.concat_tables(held).sort_by(keys)
