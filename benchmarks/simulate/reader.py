"""A reader of a store's logs and files, as Delta's protocol has them, that shares no code with the store."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
TABLES = ("videos", "segments", "tokens", "answers", "verdicts", "recipes", "runs")


class PromiseError(Exception):
    """The store is not what its promises say: what is wrong, in words."""


@dataclass
class TableRead:
    """What a table's log names, commit by commit."""

    fs: Any  # fsspec's
    name: str
    folder: str
    version: int = -1
    added_in: dict[str, int] = field(default_factory=dict)  # of the files named now: the commit that named them
    rows: dict[str, list[Row]] = field(default_factory=dict)  # of all files that ever were, as they were written

    def refresh(self, hurt: Iterable[str]) -> list[str]:
        """Read what was committed since; returns the files that are new. Raises PromiseError."""
        new: list[str] = []
        commits = self._names(f"{self.folder}/_delta_log")
        while (commit := f"{self.version + 1:020}.json") in commits:
            self.version += 1
            for line in self.fs.cat_file(f"{self.folder}/_delta_log/{commit}").splitlines():
                action = json.loads(line)
                if "add" in action:
                    self.added_in[action["add"]["path"]] = self.version
                    new.append(action["add"]["path"])
                elif "remove" in action:
                    self.added_in.pop(action["remove"]["path"], None)
        new = [path for path in new if path in self.added_in]
        for path in new:
            self.rows[path] = self._read(path)
        there = {*self.on_disk()} | {uri.rpartition("/")[2] for uri in hurt}
        for path in self.added_in:
            if path not in there:
                raise PromiseError(f"the log names {self.name}/{path}, which is gone")
        return new

    def now(self) -> Iterable[tuple[str, Row]]:
        """The rows of the files named now, and the file of each."""
        for path in self.added_in:
            for row in self.rows[path]:
                yield path, row

    def on_disk(self) -> list[str]:
        """Every data file in the folder, named or not."""
        return sorted(name for name in self._names(self.folder) if name.endswith(".parquet"))

    def read(self, path: str, columns: list[str] | None = None) -> list[Row]:
        """The rows of a file as it is now. Raises what a file that is not whole makes pyarrow raise."""
        source = pa.BufferReader(self.fs.cat_file(f"{self.folder}/{path}"))
        found: list[Row] = pq.read_table(source, columns=columns, page_checksum_verification=True).to_pylist()
        return found

    def _read(self, path: str) -> list[Row]:
        try:
            return self.read(path)
        except Exception as error:
            raise PromiseError(f"{self.name}/{path} is named and cannot be read: {error}") from error

    def _names(self, folder: str) -> set[str]:
        self.fs.invalidate_cache()
        try:
            return {path.rpartition("/")[2] for path in self.fs.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()


class StoreRead:
    """All tables, read anew as often as one likes.

    Args:
        uri: of a store, which need not exist yet.
    """

    def __init__(self, uri: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(uri)
        self.tables = {name: TableRead(self.fs, name, f"{self.root}/{name}") for name in TABLES}

    def refresh(self, hurt: Iterable[str]) -> dict[str, list[Row]]:
        """Read what is new; returns the rows of new files by table, in the order in which they were committed."""
        found: dict[str, list[Row]] = {}
        for name, table in self.tables.items():
            new = sorted(table.refresh(hurt), key=table.added_in.__getitem__)
            found[name] = [row for path in new for row in table.rows[path]]
        return found

    def rows(self, table: str) -> list[Row]:
        """The rows of a table now."""
        return [row for _, row in self.tables[table].now()]

    def live(self) -> dict[tuple[str, str], Row]:
        """What is live, by video and recipe: as schemas/views.sql says in words, the newest counts."""
        deleted: dict[str, tuple[int, str]] = {}
        forgotten: dict[str, tuple[int, bool]] = {}
        newest: dict[tuple[str, str], Row] = {}
        for row in self.rows("videos"):
            age = _age(row)
            if row["status"] == "deleted":
                deleted[row["video_id"]] = max(deleted.get(row["video_id"], age), age)
                said = row["seq"], row["error_code"] == "forgotten"
                forgotten[row["video_id"]] = max(forgotten.get(row["video_id"], said), said)
            elif row["status"] == "indexed":
                key = row["video_id"], row["recipe"]
                if key not in newest or age > _age(newest[key]):
                    newest[key] = row
        return {
            key: row
            for key, row in newest.items()
            if key[0] not in deleted or (not forgotten[key[0]][1] and _age(row) > deleted[key[0]])
        }

    def kept_out(self) -> set[str]:
        """The videos that are forgotten now."""
        newest: dict[str, tuple[int, bool]] = {}
        for row in self.rows("videos"):
            if row["status"] == "deleted":
                said = row["seq"], row["error_code"] == "forgotten"
                newest[row["video_id"]] = max(newest.get(row["video_id"], said), said)
        return {video for video, (_, is_forgotten) in newest.items() if is_forgotten}

    def holders(self, video: str) -> list[str]:
        """Files on the disk, named or not, with a row of a video that is no tombstone, or that nobody can read.

        Of what rots it is known what was written.
        """
        found = []
        for name in ("tokens", "segments", "answers", "verdicts", "videos"):
            for path in self.tables[name].on_disk():
                columns = ["video_id", *(["error_code"] if name == "videos" else [])]
                try:
                    rows = self.tables[name].rows.get(path) or self.tables[name].read(path, columns)
                except Exception:  # noqa: BLE001 - half a file, or a rotten one, raises anything
                    found.append(f"{name}/{path} (unreadable)")
                    continue
                if any(row["video_id"] == video and row.get("error_code") != "forgotten" for row in rows):
                    found.append(f"{name}/{path}")
        return found


def _age(row: Row) -> tuple[int, str]:
    return row["seq"], row["write_id"] or ""
