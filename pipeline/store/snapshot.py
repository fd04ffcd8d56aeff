"""What a reader holds on to: the files of every table at one moment, whatever is written meanwhile."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from longvlm.schemas.tables import TABLES


@dataclass(frozen=True)
class DataFile:
    """A parquet file as Delta's log describes it; ids and `seq` are None where its rows have none."""

    uri: str  # absolute path or URL
    size_bytes: int
    num_rows: int
    min_write_id: str | None = None
    max_write_id: str | None = None
    max_seq: int | None = None  # of tables whose rows have one


@dataclass(frozen=True)
class PinnedTable:
    """The files of one table at one version of its log."""

    version: int = -1  # of a table that was not pinned
    files: tuple[DataFile, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """The tables of a store, pinned videos first, so that every video seen has its segments and tokens.

    Those of a store without rows, where none are given.
    """

    tables: Mapping[str, PinnedTable] = field(default_factory=lambda: dict.fromkeys(TABLES, PinnedTable()))

    def table(self, name: str) -> PinnedTable:
        """A table's pinned files; a table that was left out has none."""
        return self.tables.get(name, PinnedTable())

    def newest_seq(self, table: str) -> int:
        """The largest `seq` that a table holds, by the log's statistics alone; 0 where it holds none."""
        return max((file.max_seq or 0 for file in self.table(table).files), default=0)

    def files_for(self, table: str, write_ids: Iterable[str]) -> list[DataFile]:
        """The files of a table that may hold rows of any of these writes, by the log's statistics alone."""
        wanted = sorted(write_ids)
        found = []
        for file in self.table(table).files:
            if file.min_write_id is None or file.max_write_id is None:
                continue
            first = bisect_left(wanted, file.min_write_id)
            if first < len(wanted) and wanted[first] <= file.max_write_id:
                found.append(file)
        return found
