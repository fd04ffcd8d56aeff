"""Upkeep of a store's files: small ones are merged into few, those of mostly dead rows rewritten without them."""

import contextlib
import errno
import json
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import CommitFailedError

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import conformed, filesystem, write_pieces
from longvlm.pipeline.store.health import DamagedError, OutOfReachError, TracedFile, why_damaged
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.store.upkeep.dead import Dead

_MERGED = ("videos", "segments", "answers", "verdicts")  # at the end of each job; tokens are large as they come
_COMPACTED = ("tokens", "segments", "answers", "verdicts")  # whose rows die
_SMALL_BYTES = 16 << 20
_TARGET_BYTES = 64 << 20
_PIECE_BYTES = 32 << 20  # of rows in memory, before they are ordered and written
_MIN_FILES = 8  # fewer are not worth a rewrite
_DEAD_SHARE = 0.5  # of a file's rows, above which it is rewritten: what is copied is less than what is freed
_TRIES = 3

_MOSTLY_DEAD = """
SELECT filename FROM {rows} t LEFT JOIN dead d USING (write_id)
GROUP BY filename HAVING count(d.write_id) > {share} * count(*)
"""

logger = logging.getLogger(__name__)

Keep = Callable[[pa.Table], pa.Table]


class Rewritten(NamedTuple):
    """What came of a rewrite."""

    num_files: int  # new ones
    num_left_out: int  # rows


def merge_small_files(store: Store) -> dict[str, int]:
    """Merge the small files of `videos`, `segments`, `answers` and `verdicts`; meant for the end of a job.

    Every row is kept. Nothing is deleted from the disk, so readers that pinned the store before still find their files.
    Where another writer keeps changing a table it is left as it is until the next job: its small files do no harm. So
    is a damaged file, with a warning in the log.

    Returns:
        How many files were merged away, per table.
    """
    return {table: _until_done(store, table, _small_files) for table in _MERGED}


def compact(store: Store, dead: Dead) -> dict[str, int]:
    """Merge small files of all tables, tokens too, and rewrite those of which most rows belong to dead writes.

    Dead rows are left out wherever a file is rewritten, of `videos` none. As with merging, the old files stay on the
    disk until they are vacuumed.

    Args:
        store: opened by this process.
        dead: as `dead_writes` finds them.

    Returns:
        How many files are fewer, per table.
    """
    fewer = {"videos": _until_done(store, "videos", _small_files)}
    for table in _COMPACTED:
        mostly = _mostly_dead(store.pin((table,)), table, dead)
        fewer[table] = _until_done(store, table, partial(_some_of, mostly), dead.write_ids)
        fewer[table] += _until_done(store, table, _small_files, dead.write_ids)
    return fewer


def rewrite(
    store: Store,
    table: str,
    files: Sequence[DataFile],
    keep: Keep,
    damaged: dict[str, str] | None = None,
) -> Rewritten:
    """Put new files in the place of some, with the rows that `keep` returns of each row group, in the usual layout.

    Small files become one of about the target's size, a larger one becomes one. The new files have all columns of the
    table, also those that a newer version added. No more than `_PIECE_BYTES` of rows are in memory at a time, and as
    much again while they are put in order.

    Args:
        store: opened by this process.
        table: its name.
        files: to be replaced, all in one commit.
        keep: what is left of some rows.
        damaged: takes in, by uri, why a file is not what was written, and its rows that cannot be read are left out; if
            None such a file is refused. A copy would make its checksums right.

    Raises:
        CommitFailedError: another writer replaced some of the files since.
        DamagedError: a file cannot be read. After both the new files are deleted again.
    """
    schema = store.columns(table)
    new: list[dict[str, Any]] = []
    try:
        for batch in batches(files):
            pieces = _pieces(schema, batch, keep, damaged)
            if (first := next(pieces, None)) is not None:
                new.append(write_pieces(store.uri, table, schema, chain([first], pieces)))
        store.replace_files(table, files, new)
    except (CommitFailedError, DamagedError, OSError):
        if not _are_named(store, table, new):  # a store may have taken a commit and not have said so
            _delete(store, table, new)
            raise
    num_kept = sum(json.loads(shard["stats"])["numRecords"] for shard in new)
    return Rewritten(len(new), sum(file.num_rows for file in files) - num_kept)


def _until_done(
    store: Store,
    table: str,
    choose: Callable[[tuple[DataFile, ...]], list[DataFile]],
    dead: pa.Array | None = None,
) -> int:
    """Rewrite batches of files as long as `choose` finds any; returns how many files there are fewer."""
    num_gone = 0
    num_conflicts = 0
    damaged: set[str] = set()
    while num_conflicts < _TRIES:
        pinned = store.pin((table,)).table(table)
        batch = choose(tuple(file for file in pinned.files if file.uri not in damaged))
        if not batch:
            break
        try:
            num_gone += len(batch) - rewrite(store, table, batch, _without(dead)).num_files
        except CommitFailedError:  # another writer came first: start over from what is there now
            num_conflicts += 1
        except DamagedError as error:
            damaged.add(error.uri)
            logger.warning("%s is damaged (%s) and left as it is; `longvlm maintain --verify` says more", *error.args)
    return num_gone


def _without(dead: pa.Array | None) -> Keep:
    """What drops the rows of dead writes: of these, which are in order and may be millions, it looks at few."""
    if dead is None or not len(dead):
        return lambda rows: rows

    def keep(rows: pa.Table) -> pa.Table:
        ends = pc.min_max(rows["write_id"]).as_py()
        if ends["min"] is None:
            return rows
        first = bisect_left(range(len(dead)), ends["min"], key=lambda at: dead[at].as_py())
        last = bisect_right(range(len(dead)), ends["max"], key=lambda at: dead[at].as_py())
        if first == last:
            return rows
        return rows.filter(pc.invert(pc.is_in(rows["write_id"], dead.slice(first, last - first))))

    return keep


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


def _mostly_dead(snapshot: Snapshot, table: str, dead: Dead) -> set[str]:
    """Files of which most rows are dead. Only those are looked into in which something may have died lately."""
    candidates = snapshot.files_for(table, dead.fresh.to_pylist())
    if not candidates:
        return set()
    with catalog.connect(Snapshot({table: PinnedTable(0, tuple(candidates))}), ()) as con:
        con.register("dead", pa.table({"write_id": dead.write_ids}))
        sql = _MOSTLY_DEAD.format(rows=catalog.rows_of(file.uri for file in candidates), share=_DEAD_SHARE)
        return {uri for (uri,) in con.execute(sql).fetchall()}


def _some_of(uris: set[str], files: tuple[DataFile, ...]) -> list[DataFile]:
    """Those of the files that are among the uris, as many as leave about the target's size of rows."""
    batch: list[DataFile] = []
    num_bytes = 0
    for file in files:
        if file.uri in uris and (not batch or (num_bytes + file.size_bytes) * _DEAD_SHARE < _TARGET_BYTES):
            batch.append(file)
            num_bytes += file.size_bytes
    return batch


def batches(files: Sequence[DataFile]) -> Iterator[list[DataFile]]:
    """Files in the order of their writes, as many together as make one of about the target's size."""
    batch: list[DataFile] = []
    for file in sorted(files, key=lambda file: file.min_write_id or ""):
        if batch and sum(held.size_bytes for held in batch) + file.size_bytes > _TARGET_BYTES:
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _pieces(
    schema: pa.Schema, files: Sequence[DataFile], keep: Keep, damaged: dict[str, str] | None
) -> Iterator[pa.Table]:
    """The rows that are kept, some MB at a time, each piece ordered by write id and segment."""
    keys = [(name, "ascending") for name in ("write_id", "segment") if name in schema.names]
    held: list[pa.Table] = []
    num_bytes = 0
    for file in files:
        for rows in map(keep, row_groups(file, schema, damaged)):
            held.append(rows)
            num_bytes += rows.nbytes
            if num_bytes > _PIECE_BYTES:
                yield pa.concat_tables(held).sort_by(keys)
                held, num_bytes = [], 0
    if any(rows.num_rows for rows in held):
        yield pa.concat_tables(held).sort_by(keys)


def row_groups(
    file: DataFile, schema: pa.Schema, damaged: dict[str, str] | None, write_ids: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The row groups of a file, or those that may hold some writes, which are in order; checksums are verified.

    Those that are damaged are noted and left out, or raise DamagedError.
    """
    fs, path = filesystem(file.uri)
    with _damage_of(file, damaged), fs.open(path, "rb") as opened:
        source = TracedFile(opened)
        with _told_from_damage(source):
            parquet = pq.ParquetFile(source, page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            if write_ids is not None and not _may_hold(parquet, group, write_ids):
                continue
            rows = None
            with _damage_of(file, damaged), _told_from_damage(source):
                rows = conformed(parquet.read_row_group(group, use_threads=False), schema)
            if rows is not None:
                yield rows


def _may_hold(parquet: pq.ParquetFile, group: int, write_ids: Sequence[str]) -> bool:
    said = parquet.metadata.row_group(group).column(parquet.schema_arrow.get_field_index("write_id")).statistics
    if said is None or not said.has_min_max:
        return True
    return bisect_left(write_ids, said.min) < bisect_right(write_ids, said.max)


@contextlib.contextmanager
def _damage_of(file: DataFile, damaged: dict[str, str] | None) -> Iterator[None]:
    """What is raised in the body because a file is not what was written: noted, or raised as DamagedError."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError) as error:
        is_away = isinstance(error, OutOfReachError | TimeoutError | ConnectionError)
        if is_away or (isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)):
            raise  # out of reach, which is not the file's fault
        reason = str(error).partition("\n")[0]
        if damaged is None:
            raise DamagedError(file.uri, reason) from error
        damaged[file.uri] = reason


@contextlib.contextmanager
def _told_from_damage(source: TracedFile) -> Iterator[None]:
    """What is raised in the body because a read failed, as OutOfReachError."""
    try:
        yield
    except Exception as error:
        if source.error is not None:
            raise OutOfReachError(f"a file of the store cannot be read ({why_damaged(source.error)})") from error
        raise


def _are_named(store: Store, table: str, shards: Sequence[dict[str, Any]]) -> bool:
    named = {file.uri.rpartition("/")[2] for file in store.pin((table,)).table(table).files}
    return bool(shards) and all(shard["path"] in named for shard in shards)


def _delete(store: Store, table: str, shards: Sequence[dict[str, Any]]) -> None:
    """Delete files that no log names."""
    fs, root = filesystem(f"{store.uri}/{table}")
    for shard in shards:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{root}/{shard['path']}")
