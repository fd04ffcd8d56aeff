"""Writes whose tokens, segments and answers nobody can see any more, and since when."""

import time
from datetime import timedelta

import pyarrow as pa

from pipeline.store import catalog
from pipeline.store.ledger import Store
from pipeline.store.snapshot import DataFile, PinnedTable, Snapshot

# How far back shards are looked through for writes that no videos row ever named: the nights before saw older ones.
_ABANDONED_DAYS = 14

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
)
SELECT write_id FROM ended ANTI JOIN (SELECT write_id FROM live_videos) USING (write_id)
GROUP BY write_id
HAVING coalesce(max(ended_seq), 0) < $before
    OR bool_or(video_id IN (SELECT video_id FROM deletions WHERE is_forgotten))
"""
# Left by a run that died between its commits, or by a video of several units that failed.
_ABANDONED = """
SELECT DISTINCT write_id FROM (
    SELECT write_id FROM ledger_tokens UNION ALL SELECT write_id FROM ledger_segments
) ANTI JOIN (SELECT write_id FROM ledger_videos WHERE status = 'indexed') USING (write_id)
WHERE write_id < $before
"""


def dead_writes(store: Store, retention_hours: float) -> pa.Array:
    """The write ids, in order, whose rows may be dropped.

    That is: superseded or deleted longer ago than the retention, begun longer ago than that and never made live, or of
    a video that was forgotten.
    """
    before_s = time.time() - retention_hours * 3600
    snapshot = store.pin(("videos", "segments", "tokens"))
    young = _first_write_id(before_s - timedelta(days=_ABANDONED_DAYS).total_seconds())
    recent = {name: _since(snapshot.table(name), young) for name in ("segments", "tokens")}
    with catalog.connect(Snapshot({"videos": snapshot.table("videos"), **recent})) as con:
        superseded = con.sql(_SUPERSEDED, params={"before": int(before_s * 1e6)}).to_arrow_table()
        abandoned = con.sql(_ABANDONED, params={"before": _first_write_id(before_s)}).to_arrow_table()
    return pa.concat_tables([superseded, abandoned]).sort_by("write_id")["write_id"].combine_chunks()


def _since(table: PinnedTable, write_id: str) -> PinnedTable:
    def is_young(file: DataFile) -> bool:
        return file.max_write_id is not None and file.max_write_id >= write_id

    return PinnedTable(table.version, tuple(filter(is_young, table.files)))


def _first_write_id(epoch_s: float) -> str:
    """The start of the UUIDv7s of a moment: all made before it sort below (see schemas.identity.new_write_id)."""
    digits = f"{max(0, int(epoch_s * 1000)):012x}"
    return f"{digits[:8]}-{digits[8:]}"
