"""What a check found damaged is taken out of a store, so that the next run indexes those videos again."""

from collections.abc import Iterable

import duckdb
import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.health import without
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Look
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.store.upkeep.verify import Verified, torn_writes
from longvlm.schemas import tables

_REPAIRED = ("tokens", "segments")  # what the ledger and the answers held cannot be made again from videos
_DELETED = """
SELECT DISTINCT video_id, source, uri, 'deleted' AS status, $run_id AS run_id,
    now()::TIMESTAMPTZ AT TIME ZONE 'UTC' AS indexed_at
FROM live_videos SEMI JOIN damaged USING (write_id)
"""


def repair(store: Store, snapshot: Snapshot, verified: Verified, run_id: str) -> int:
    """Delete the videos that lost any of their tokens or segments, and drop the damaged files from the log.

    They answer no more until they are indexed again, which the next run does, as with any deleted video whose file is
    there. One that was indexed again since it was verified stays. The files themselves stay for the retention.

    Args:
        store: opened by this process.
        snapshot: that was verified.
        verified: what came of it.
        run_id: for the rows that delete.

    Returns:
        How many videos there are to be indexed again.

    Raises:
        CommitFailedError: another writer replaced a damaged file since.
    """
    lost = [problem["write_id"] for problem in verified.problems]
    with catalog.connect(without(snapshot, verified.damaged_files)) as con:
        num_deleted = _delete(store, con, lost, run_id)
    for table in _REPAIRED:
        pinned = store.pin((table,)).table(table)
        damaged = [file for file in pinned.files if file.uri in verified.damaged_files]
        if damaged:
            store.replace_files(table, damaged, [])
    return num_deleted


def delete_torn(store: Store, run_id: str) -> int:
    """Delete the live videos that lack any of their tokens or segments; returns how many are to be indexed again."""
    with catalog.connect(store.pin(("videos", "segments", "tokens"))) as con:
        return _delete(store, con, [torn["write_id"] for torn in torn_writes(con)], run_id)


def _delete(store: Store, con: duckdb.DuckDBPyConnection, write_ids: Iterable[str], run_id: str) -> int:
    con.register("damaged", pa.table({"write_id": pa.array(write_ids, pa.string())}))
    sql = f"(FROM ledger_videos WHERE false) UNION ALL BY NAME ({_DELETED})"
    deleted = con.sql(sql, params={"run_id": run_id}).to_arrow_table().cast(tables.VIDEOS)
    ((seq,),) = con.execute("SELECT coalesce(max(seq), 0) FROM ledger_videos").fetchall()
    return deleted.num_rows - store.append("videos", deleted, Look(seq)).num_rows
