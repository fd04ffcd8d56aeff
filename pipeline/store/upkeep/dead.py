"""Writes whose tokens, segments, answers and verdicts nobody can see any more, and since when."""

from datetime import timedelta
from typing import NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from longvlm.pipeline.store import catalog, delta
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import DataFile, Snapshot
from longvlm.schemas import clock

# What died, or was begun, longer than this before the retention was seen by the nights before.
_LOOK_BACK_S = timedelta(days=14).total_seconds()

# A write dies when a later one of its video and recipe, or a deletion, takes its place; one that moved along with its
# video stands in several rows, and dies with the last. Those of forgotten videos are dead at once.
_SUPERSEDED = """
WITH writes AS (
    SELECT video_id, write_id, seq, lead(seq) OVER (PARTITION BY video_id, recipe ORDER BY seq, write_id) AS next_seq
    FROM ledger_videos WHERE status = 'indexed'
),
ended AS (
    SELECT w.video_id, w.write_id, w.seq, least(w.next_seq, min(d.seq)) AS ended_seq
    FROM writes w LEFT JOIN ledger_videos d
        ON d.video_id = w.video_id AND d.status = 'deleted' AND d.seq >= w.seq
    GROUP BY w.video_id, w.write_id, w.seq, w.next_seq
),
died AS (
    SELECT write_id, coalesce(max(ended_seq), 0) AS died_seq,
        bool_or(video_id IN (SELECT video_id FROM deletions WHERE is_forgotten)) AS is_forgotten
    FROM ended ANTI JOIN (SELECT write_id FROM live_videos) USING (write_id)
    GROUP BY write_id
)
SELECT write_id, is_forgotten OR died_seq >= $since AS is_fresh FROM died WHERE died_seq < $before OR is_forgotten
"""
_HELD = """
INSERT INTO held
SELECT DISTINCT write_id, added_us FROM {rows} JOIN added USING (filename)
"""
# Left by a run that died between its commits, by a video of several units that failed, or by answers to a video that
# was forgotten meanwhile. A run plans many videos at once and may take days to reach the last: that a write was begun
# long ago says nothing, the newest of its files must have been there for as long.
_ABANDONED = """
SELECT write_id, true AS is_fresh FROM held
ANTI JOIN (SELECT write_id FROM ledger_videos WHERE status = 'indexed') USING (write_id)
WHERE write_id < $first_id
GROUP BY write_id HAVING max(added_us) < $before
"""


class Dead(NamedTuple):
    """Write ids whose rows may be dropped, in order."""

    write_ids: pa.Array
    fresh: pa.Array  # those of them that the nights before may not know
    abandoned: list[str]  # those of them that never were live: their writer may sleep (`Store.taking`)


def dead_writes(store: Store, retention_hours: float) -> Dead:
    """The writes whose rows may be dropped.

    That is: superseded or deleted longer ago than the retention; never made live, though begun and committed longer ago
    than that; or of a video that was forgotten.
    """
    before_s = clock.now_s() - retention_hours * 3600
    before_us, since_us = int(before_s * 1e6), int((before_s - _LOOK_BACK_S) * 1e6)
    snapshot = store.pin(("videos", "segments", "tokens", "answers", "verdicts"))
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")}), ("live_videos",)) as con:
        superseded = con.sql(_SUPERSEDED, params={"before": before_us, "since": since_us}).to_arrow_table()
        con.execute("CREATE TEMP TABLE held (write_id VARCHAR, added_us BIGINT)")
        for table, files in recent_files(snapshot, retention_hours).items():
            _note_held(con, store, table, files)
        values = {"before": before_us, "first_id": _first_write_id(before_s)}
        abandoned = con.sql(_ABANDONED, params=values).to_arrow_table()
    dead = pa.concat_tables([superseded, abandoned]).sort_by("write_id")
    ids, fresh = (rows["write_id"].combine_chunks() for rows in (dead, dead.filter(dead["is_fresh"])))
    return Dead(ids, fresh, abandoned["write_id"].to_pylist())


def recent_files(snapshot: Snapshot, retention_hours: float) -> dict[str, tuple[DataFile, ...]]:
    """The files of writes that the nights before may not know; of answers and verdicts all: they come at any time."""
    since = _first_write_id(clock.now_s() - retention_hours * 3600 - _LOOK_BACK_S)
    found = {table: snapshot.table(table).files for table in ("answers", "verdicts")}
    for table in ("tokens", "segments"):
        files = snapshot.table(table).files
        found[table] = tuple(file for file in files if file.max_write_id is not None and file.max_write_id >= since)
    return found


def _note_held(con: duckdb.DuckDBPyConnection, store: Store, table: str, files: tuple[DataFile, ...]) -> None:
    """Note which writes some files hold, and when the log came to name those files."""
    if not files:
        return
    actions = delta.added(store.handle(table))
    names = pc.binary_join_element_wise(f"{store.uri}/{table}", actions["path"].cast(pa.string()), "/")
    added_us = pc.multiply(actions["modification_time"], 1000)
    con.register("added", pa.table({"filename": names, "added_us": added_us}))
    con.execute(_HELD.format(rows=catalog.rows_of(file.uri for file in files)))
    con.unregister("added")


def _first_write_id(epoch_s: float) -> str:
    """The start of the UUIDv7s of a moment: all made before it sort below (see schemas.identity.new_write_id)."""
    digits = f"{max(0, int(epoch_s * 1000)):012x}"
    return f"{digits[:8]}-{digits[8:]}"
