"""What a driver was told of and has not made live yet: shards that wait to be named, and the writes they belong to."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import filesystem
from longvlm.pipeline.store.snapshot import PinnedTable, Snapshot

SHARDED = ("tokens", "segments")
_COUNTED = "SELECT write_id, count(*) FROM ledger_{table} SEMI JOIN asked USING (write_id) GROUP BY write_id"


@dataclass
class WaitingShard:
    """A closed shard that no log names yet, and whose rows it has."""

    said: dict[str, Any]  # tables.SHARD
    video_ids: set[str] = field(default_factory=set)
    write_ids: set[str] = field(default_factory=set)


class Uncommitted:
    """The shards of writes that are not live yet, as outcomes tell of them."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, WaitingShard]] = {table: {} for table in SHARDED}
        self._named: dict[str, set[str]] = {table: set() for table in SHARDED}
        self._shards: dict[str, dict[str, set[str]]] = {}  # write id -> table -> paths
        self._lost: set[str] = set()  # write ids

    def add(self, outcomes: pa.Table) -> None:
        """Take in tables.OUTCOMES; the same ones may come twice."""
        names = ["video_id", "write_id", *(f"{table}_shard" for table in SHARDED)]
        for row in outcomes.select(names).to_pylist():
            for table in SHARDED:
                said = row[f"{table}_shard"]
                if said is None:
                    continue
                self._shards.setdefault(row["write_id"], {}).setdefault(table, set()).add(said["path"])
                if said["path"] not in self._named[table]:
                    shard = self._waiting[table].setdefault(said["path"], WaitingShard(said))
                    shard.video_ids.add(row["video_id"])
                    shard.write_ids.add(row["write_id"])

    def waiting(self, table: str) -> Mapping[str, WaitingShard]:
        """The shards of a table that wait to be named, by path."""
        return dict(self._waiting[table])

    def named(self, table: str, paths: Iterable[str]) -> None:
        """Note that the log of a table names these shards now."""
        for path in paths:
            self._named[table].add(path)
            del self._waiting[table][path]

    def lose(self, table: str, paths: Iterable[str]) -> None:
        """Note that these shards will never be named, and that the writes in them cannot be whole any more."""
        for path in paths:
            self._lost |= self._waiting[table].pop(path).write_ids

    def torn(
        self, rows: pa.Table, names: Callable[[str], frozenset[str]], pin: Callable[[str], PinnedTable]
    ) -> set[str]:
        """Which of the writes that some rows of `tables.VIDEOS` would make live lack a segment.

        Args:
            rows: those that are `indexed`.
            names: the names of the files of a table now.
            pin: a table now; only asked where a shard was merged with others meanwhile, or taken.
        """
        wanted = dict(zip(rows["write_id"].to_pylist(), rows["num_segments"].to_pylist(), strict=True))
        torn = self._lost & wanted.keys()
        for table in SHARDED:
            held = names(table)
            moved = {write for write in wanted if not self._shards.get(write, {}).get(table, set()) <= held} - torn
            if moved:
                counted = _num_rows(table, pin(table), moved)
                torn |= {write for write in moved if counted.get(write) != wanted[write]}
        return torn

    def settle(self, write_ids: Iterable[str]) -> None:
        """Forget writes that are live, or never will be."""
        for write in write_ids:
            self._shards.pop(write, None)
            self._lost.discard(write)


def missing_files(table_uri: str, paths: Iterable[str]) -> set[str]:
    """Which files of a table are not there, as the store itself says and no listing from before."""
    fs, root = filesystem(table_uri)
    fs.invalidate_cache()
    return {path for path in paths if not fs.exists(f"{root}/{path}")}


def _num_rows(table: str, pinned: PinnedTable, write_ids: set[str]) -> dict[str, int]:
    files = Snapshot({table: pinned}).files_for(table, write_ids)
    with catalog.connect(Snapshot({table: PinnedTable(pinned.version, tuple(files))}), ()) as con:
        con.register("asked", pa.table({"write_id": pa.array(sorted(write_ids), pa.string())}))
        return dict(con.execute(_COUNTED.format(table=table)).fetchall())
