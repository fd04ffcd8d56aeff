"""What the ledger says when something is committed: what became of the videos it is about since they were looked at."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longvlm.pipeline.store.files import filesystem
from longvlm.pipeline.store.snapshot import DataFile

FORGOTTEN = "forgotten"  # the error code of a deletion that is to last
PROVED = "erased"  # the error of one that was proved to hold: until there is one, something of the video may be left
Content = tuple[int, str | datetime | None]
_CONTENT = ["size_bytes", "etag", "modified_at"]
_COLUMNS = ["video_id", "status", "error_code", "seq", *_CONTENT]


@dataclass(frozen=True)
class Look:
    """A look at the ledger, upon which rows about its videos rest."""

    seq: int  # the largest that it held; rows come in the order of theirs
    tied: Mapping[str, str] = field(default_factory=dict)  # videos whose rows stand or fall together: a move's two ids

    def holds(self, rows: pa.Table, files: Iterable[DataFile]) -> pa.Array:
        """Which rows of tables.VIDEOS are about videos of which nothing newer stands in the ledger.

        Args:
            rows: to be committed.
            files: of the ledger now.

        Raises:
            OSError, pa.ArrowException: a file is gone, damaged or out of reach.
        """
        changed = {
            video
            for file in files
            if (file.max_seq or 0) > self.seq
            for video in _newer_in(file, self.seq, ["video_id"])["video_id"].to_pylist()
        }
        changed |= self._tied_to(changed)
        return pc.invert(pc.is_in(rows["video_id"], pa.array(changed, pa.string())))

    def _tied_to(self, changed: set[str]) -> set[str]:
        return {video for pair in self.tied.items() if not changed.isdisjoint(pair) for video in pair}


@dataclass
class Listed:
    """A listing of a source, upon which rows about its videos rest, once they were watched.

    Another run may have listed the source later and be done sooner. Where it came to know another content of a video
    than these rows do, or its deletion, only the source can tell whose is the older.
    """

    seq: int  # the largest that the ledger held when the listing began
    planned_seq: int  # and when the videos were planned
    run_id: str  # of the run that listed
    is_there: Callable[[Mapping[str, Any]], bool]  # whether the file of a row is in the source now as it was listed
    overtaken: set[str] = field(default_factory=set)  # write ids of rows that gave way to another run's
    _others: dict[str, dict[str, set[Content | None]]] = field(default_factory=dict)  # by file, which never changes

    def holds(self, rows: pa.Table, files: Iterable[DataFile]) -> pa.Array:
        """Which rows of tables.VIDEOS no other run disputes, or are right by the source. Arguments as `Look.holds`."""
        newer = [file for file in files if (file.max_seq or 0) > self.seq]
        known_of = self._others
        self._others = {f.uri: known_of[f.uri] if f.uri in known_of else self._of_others(f) for f in newer}
        for row in rows.to_pylist() if any(self._others.values()) else []:
            contents = set().union(*(videos.get(row["video_id"], set()) for videos in self._others.values()))
            if contents - {_content_of(row)} and not self.is_there(row):
                self.overtaken.add(row["write_id"])
        return pc.invert(pc.is_in(rows["write_id"], pa.array(self.overtaken, pa.string())))

    def _of_others(self, file: DataFile) -> dict[str, set[Content | None]]:
        """What other runs say in a file of the contents of videos, None of one that is deleted."""
        rows = _newer_in(file, self.seq, ["video_id", "run_id", *_CONTENT])
        found: dict[str, set[Content | None]] = {}
        for row in rows.filter(pc.not_equal(rows["run_id"], self.run_id)).to_pylist():
            found.setdefault(row["video_id"], set()).add(_content_of(row))
        return found


class Deletion(NamedTuple):
    """A video's newest deletion."""

    seq: int
    is_forgotten: bool
    content: Content | None  # of the file that was forgotten, where that is known


class Tombstones:
    """The deletions of a ledger. Files never change, so each is read once as long as the log names it."""

    def __init__(self) -> None:
        self._by_file: dict[str, dict[str, Deletion]] = {}  # uri -> video id -> the newest that it holds

    def read(self, files: Iterable[DataFile]) -> dict[str, Deletion]:
        """The videos that are forgotten according to these files of `videos`: whose newest deletion says so.

        Raises:
            OSError, pa.ArrowException: a file is gone, damaged or out of reach.
        """
        uris = [file.uri for file in files]
        self._by_file = {uri: self._by_file[uri] if uri in self._by_file else _deletions(uri) for uri in uris}
        newest: dict[str, Deletion] = {}
        for deletions in self._by_file.values():
            for video, deletion in deletions.items():
                newest[video] = _newer(newest.get(video), deletion)
        return {video: deletion for video, deletion in newest.items() if deletion.is_forgotten}


def alike(rows: pa.Table, tombstones: Mapping[str, Deletion], since: int | None) -> frozenset[str]:
    """The ids of rows of tables.VIDEOS with the content of a video that was forgotten after a seq; None: of nobody."""
    contents = {one.content for one in tombstones.values() if since is not None and one.seq > since} - {None}
    return frozenset(row["video_id"] for row in (rows.to_pylist() if contents else []) if _content_of(row) in contents)


def _newer_in(file: DataFile, seq: int, columns: list[str]) -> pa.Table:
    """Some columns of the rows of a file of `videos` that are newer than a seq."""
    fs, path = filesystem(file.uri)
    with fs.open(path, "rb") as source:
        rows = pq.read_table(source, columns=[*columns, "seq"], use_threads=False, page_checksum_verification=True)
    return rows.filter(pc.greater(rows["seq"], seq))


def _content_of(row: Mapping[str, Any]) -> Content | None:
    """What tells the content of a file of a listing from another, as the macro in views.sql; None for an empty one."""
    if not row["size_bytes"]:
        return None
    return row["size_bytes"], row["etag"] or row["modified_at"]


def _deletions(uri: str) -> dict[str, Deletion]:
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as source:
        rows = pq.read_table(source, columns=_COLUMNS, use_threads=False, page_checksum_verification=True)
    rows = rows.filter(pc.equal(rows["status"], "deleted"))
    newest: dict[str, Deletion] = {}
    for row in rows.to_pylist():
        is_forgotten = row["error_code"] == FORGOTTEN
        deletion = Deletion(row["seq"], is_forgotten, _content_of(row) if is_forgotten else None)
        newest[row["video_id"]] = _newer(newest.get(row["video_id"]), deletion)
    return newest


def _newer(one: Deletion | None, other: Deletion) -> Deletion:
    return other if one is None or one[:2] < other[:2] else one
