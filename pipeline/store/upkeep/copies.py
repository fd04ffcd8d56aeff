"""Live videos copied under another recipe of the same tokens, row by row: planned, written and committed in waves."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import write_pieces
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Look
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.store.upkeep.compact import row_groups
from longvlm.schemas import tables
from longvlm.schemas.errors import TerminalError
from longvlm.schemas.identity import new_write_id

_PIECE_BYTES = 32 << 20  # of rows in memory, before they are ordered and written
# Videos that are live under one recipe and not under another, with this content. Those whose file is known to have
# changed are the next index run's: a row of their old content would stand for newer than what is known.
_LEFT = """
CREATE TEMP TABLE left_over AS
SELECT v.* FROM live_videos v
WHERE v.recipe = $old AND NOT EXISTS (
    FROM live_videos n
    WHERE n.recipe = $new AND n.video_id = v.video_id
        AND content_of(n.size_bytes, n.etag, n.modified_at)
            IS NOT DISTINCT FROM content_of(v.size_bytes, v.etag, v.modified_at)
)
"""
_SOME = """
SELECT * EXCLUDE (outdated) FROM left_over ANTI JOIN given_up USING (write_id)
WHERE NOT outdated ORDER BY write_id LIMIT ?
"""


@dataclass(frozen=True)
class LeftOver:
    """What is live under one recipe and not under another."""

    snapshot: Snapshot
    look: Look
    rows: list[dict[str, Any]]  # of tables.VIDEOS, the first ones by write id
    num_videos: int
    num_outdated: int  # besides


@dataclass(frozen=True)
class Copied:
    """What a wave was written as, and what of it could not be copied."""

    outcomes: pa.Table  # tables.OUTCOMES, a unit a video
    videos: pa.Table  # tables.VIDEOS
    copied_from: dict[str, str]  # the write that each of these was
    num_bytes: dict[str, tuple[int, int]]  # of their rows of tokens, as they were and as they are
    problems: dict[str, str]  # by the write that was to be copied


def find_left_over(store: Store, old: str, new: str, given_up: list[str], most: int) -> LeftOver:
    """The videos that are live under a recipe, and not with the same content under another.

    Args:
        store: opened by this process.
        old: fingerprint of the one.
        new: of the other.
        given_up: writes that are left out.
        most: rows that are returned.
    """
    snapshot = store.pin(("videos", "tokens", "segments"))
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")}), ("live_videos",)) as con:
        con.execute(_LEFT, {"old": old, "new": new})
        con.register("given_up", pa.table({"write_id": pa.array(given_up, pa.string())}))
        rows = con.sql(_SOME, params=[most]).to_arrow_table().cast(tables.VIDEOS).to_pylist()
        counted = "SELECT count(*) FILTER (NOT outdated), count(*) FILTER (outdated) FROM left_over"
        ((num_videos, num_outdated),) = con.execute(counted).fetchall()
    return LeftOver(snapshot, Look(snapshot.newest_seq("videos")), rows, num_videos, num_outdated)


def write_copies(
    store: Store,
    snapshot: Snapshot,
    rows: list[dict[str, Any]],
    recipe: str,
    run_id: str,
    change: Callable[[pa.Table], pa.Table],
) -> Copied:
    """Write some videos again, as one shard of tokens and one of segments, under write ids of their own.

    Their rows of `videos` stay as they are but for recipe, write and run. A piece of 32 MB is in memory at a time.

    Args:
        store: opened by this process; nothing is committed to it.
        snapshot: that the rows are of.
        rows: of tables.VIDEOS, in the order of their writes.
        recipe: fingerprint of the one that they are to be live under.
        run_id: of the run.
        change: makes rows of `tokens` of one video, some segments of it, those of the other recipe; raises
            TerminalError where that cannot be.

    Raises:
        OSError: the store is out of reach, or full.
    """
    new_ids = sorted(new_write_id() for _ in rows)
    named = {row["write_id"]: (row["video_id"], new_id) for row, new_id in zip(rows, new_ids, strict=True)}
    wave = _Wave(snapshot, recipe, named)
    shards = {
        table: _write(store, table, wave.pieces(table, change if table == "tokens" else None))
        for table in ("tokens", "segments")
    }
    for row in rows:
        if (problem := wave.problem_of(row)) is not None:
            wave.problems.setdefault(row["write_id"], problem)
    copied_from = {new: old for old, (_, new) in named.items() if old not in wave.problems}
    changes = {old: {"write_id": new, "recipe": recipe, "run_id": run_id} for new, old in copied_from.items()}
    kept = [{**row, **changes[row["write_id"]]} for row in rows if row["write_id"] in changes]
    unit = {"unit": 0, "num_units": 1, **{f"{table}_shard": shard for table, shard in shards.items()}}
    return Copied(
        pa.Table.from_pylist([{**row, **unit} for row in kept], tables.OUTCOMES),
        pa.Table.from_pylist(kept, tables.VIDEOS),
        copied_from,
        {new: wave.num_bytes[old] for new, old in copied_from.items()},
        wave.problems,
    )


def _write(store: Store, table: str, pieces: Iterator[pa.Table]) -> dict[str, Any] | None:
    first = next(pieces, None)
    return None if first is None else write_pieces(store.uri, table, tables.TABLES[table], chain([first], pieces))


@dataclass
class _Wave:
    """Videos on their way from their rows under one recipe to those under another."""

    snapshot: Snapshot
    recipe: str
    named: Mapping[str, tuple[str, str]]  # by old write id: the video's id and its new write id
    seen: dict[tuple[str, str], set[int]] = field(default_factory=lambda: defaultdict(set))  # by table and old write id
    damaged: dict[str, str] = field(default_factory=dict)  # uri -> what is wrong
    problems: dict[str, str] = field(default_factory=dict)  # by old write id
    num_bytes: dict[str, tuple[int, int]] = field(
        default_factory=lambda: defaultdict(lambda: (0, 0))
    )  # by old write id

    def pieces(self, table: str, change: Callable[[pa.Table], pa.Table] | None) -> Iterator[pa.Table]:
        """All rows of a table under their new names, some MB at a time, each piece in order."""
        held: list[pa.Table] = []
        num_bytes = 0
        for write_id, rows in self._rows(table):
            try:
                changed = rows if change is None else change(rows)
            except TerminalError as error:
                self.problems.setdefault(write_id, error.message)
                continue
            if table == "tokens":
                before, after = self.num_bytes.get(write_id, (0, 0))
                self.num_bytes[write_id] = (before + rows.nbytes, after + changed.nbytes)
            held.append(self._renamed(changed, *self.named[write_id]))
            num_bytes += changed.nbytes
            if num_bytes > _PIECE_BYTES:
                yield _ordered(held)
                held, num_bytes = [], 0
        if held:
            yield _ordered(held)

    def problem_of(self, row: dict[str, Any]) -> str | None:
        """Why a row of tables.VIDEOS has not all of its segments in both tables; None if it has."""
        for table in ("tokens", "segments"):
            seen = self.seen[table, row["write_id"]]
            if seen != set(range(row["num_segments"])):
                uris = (file.uri for file in self.snapshot.files_for(table, [row["write_id"]]))
                why = "".join(f"; {uri} is damaged: {self.damaged[uri]}" for uri in uris if uri in self.damaged)
                return f"{table} has {len(seen)} segments of {row['num_segments']}{why}"
        return None

    def _rows(self, table: str) -> Iterator[tuple[str, pa.Table]]:
        """Rows as they lie, a write's of a row group at a time, each segment once."""
        schema, write_ids = tables.TABLES[table], sorted(self.named)
        for file in self.snapshot.files_for(table, write_ids):
            for group in row_groups(file, schema, self.damaged, write_ids):
                for write_id in group["write_id"].unique().to_pylist():
                    if write_id not in self.named:
                        continue
                    rows = group.filter(pc.equal(group["write_id"], write_id))
                    seen, segments = self.seen[table, write_id], rows["segment"].to_pylist()
                    firsts = {number: at for at, number in reversed(list(enumerate(segments))) if number not in seen}
                    seen.update(firsts)
                    if len(firsts) < len(segments):  # a repeated write names equal blobs twice
                        rows = rows.take(pa.array(sorted(firsts.values()), pa.int64()))
                    if rows.num_rows:
                        yield write_id, rows

    def _renamed(self, rows: pa.Table, video_id: str, write_id: str) -> pa.Table:
        for name, value in (("video_id", video_id), ("recipe", self.recipe), ("write_id", write_id)):
            column = pa.repeat(pa.scalar(value), rows.num_rows)
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
        return rows


def _ordered(held: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(held).sort_by([("write_id", "ascending"), ("segment", "ascending")])
