"""Whose rows go when some videos are forgotten: those of their names, and of the writes that moved along with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.look import FORGOTTEN, PROVED
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot

ERASED = (
    "tokens",
    "segments",
    "verdicts",
    "answers",
    "videos",
)  # the ledger last: an erasure that was cut off finds its way by it

# A video that was moved shares its writes with the name it has now and with those it had before. All that stands under
# such a name goes too, unless another video is live under it now; what lives on elsewhere, being another video, stays.
_FAMILY = """
CREATE TEMP TABLE named_writes AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN asked USING (video_id) WHERE write_id IS NOT NULL;

CREATE TEMP TABLE family AS
FROM asked UNION SELECT video_id FROM ledger_videos SEMI JOIN named_writes USING (write_id)
ANTI JOIN (SELECT video_id FROM live_videos ANTI JOIN named_writes USING (write_id)) USING (video_id);

CREATE TEMP TABLE spared AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN family USING (video_id)
SEMI JOIN (SELECT write_id FROM live_videos ANTI JOIN family USING (video_id)) USING (write_id)
ANTI JOIN named_writes USING (write_id);

CREATE TEMP TABLE writes AS
FROM named_writes UNION SELECT write_id FROM ledger_videos SEMI JOIN family USING (video_id)
ANTI JOIN spared USING (write_id) WHERE write_id IS NOT NULL;
"""
# Which rows of a table are a family's: of the ledger all of their own, but for the tombstones; as
# `VideoFamily.are_theirs`.
THEIRS = {
    table: f"""
    (video_id IN (SELECT video_id FROM family) AND NOT coalesce({spared}, false))
    OR write_id IN (SELECT write_id FROM writes)
    """
    for table in ERASED
    for spared in [f"error_code = '{FORGOTTEN}'" if table == "videos" else "write_id IN (SELECT write_id FROM spared)"]
}
# Who is kept out: the videos themselves, and the names under which they are live now; with what tells their content
# from others', for a file that comes back under another name is the same one. Who is erased once more after that was
# proved needs a tombstone that is not: a proved one may be lifted meanwhile.
_TOMBSTONES = f"""
SELECT video_id, arg_max(source, seq) FILTER (source IS NOT NULL) AS source,
    unnest(arg_max({{'etag': etag, 'size_bytes': size_bytes, 'modified_at': modified_at}}, seq)
        FILTER (status <> 'deleted' OR error_code = '{FORGOTTEN}' AND size_bytes > 0))
FROM (FROM asked UNION SELECT video_id FROM live_videos SEMI JOIN named_writes USING (write_id))
LEFT JOIN ledger_videos USING (video_id)
WHERE video_id NOT IN (
    SELECT video_id FROM ledger_videos SEMI JOIN (FROM deletions WHERE is_forgotten) USING (video_id)
    WHERE error_code = '{FORGOTTEN}' GROUP BY video_id HAVING arg_max(coalesce(error, ''), seq) <> '{PROVED}'
)
GROUP BY video_id
"""


@dataclass(frozen=True)
class VideoFamily:
    """Whose rows go: those of some videos, and of some writes under whatever name."""

    video_ids: pa.Array
    write_ids: pa.Array
    spared: pa.Array  # writes that are live under other names

    def register(self, con: duckdb.DuckDBPyConnection) -> None:
        """Show it to a database, as `THEIRS` reads it."""
        con.register("family", pa.table({"video_id": self.video_ids}))
        con.register("writes", pa.table({"write_id": self.write_ids}))
        con.register("spared", pa.table({"write_id": self.spared}))

    def are_theirs(self, table: str, rows: pa.Table) -> pa.ChunkedArray:
        """Which rows of a table go; of the ledger all of their own, but for the tombstones."""
        is_own = pc.is_in(rows["video_id"], self.video_ids)
        if table == "videos":
            is_own = pc.and_(is_own, pc.not_equal(pc.fill_null(rows["error_code"], ""), FORGOTTEN))
        else:
            is_own = pc.and_not(is_own, pc.is_in(rows["write_id"], self.spared))
        return pc.or_(is_own, pc.is_in(rows["write_id"], self.write_ids))

    def without(self, table: str, rows: pa.Table) -> pa.Table:
        """The rows of others."""
        return rows.filter(pc.invert(self.are_theirs(table, rows)))

    def holders(self, table: str, files: Sequence[DataFile]) -> list[DataFile]:
        """Which files of a table hold rows that go; only ids are read."""
        if not files:
            return []
        with catalog.connect(Snapshot({table: PinnedTable(0, tuple(files))}), ()) as con:
            self.register(con)
            rows = catalog.rows_of(file.uri for file in files)
            found = {
                uri for (uri,) in con.execute(f"SELECT DISTINCT filename FROM {rows} WHERE {THEIRS[table]}").fetchall()
            }
        return [file for file in files if file.uri in found]


def find_family(snapshot: Snapshot, video_ids: Sequence[str]) -> tuple[VideoFamily, pa.Table]:
    """All that is theirs, and who is to be kept out (video_id, source)."""
    with catalog.connect(Snapshot({"videos": snapshot.table("videos")}), ("live_videos",)) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        con.execute(_FAMILY)
        found = [con.sql(f"FROM {name}").to_arrow_table()[0] for name in ("family", "writes", "spared")]
        return VideoFamily(*(column.combine_chunks() for column in found)), con.sql(_TOMBSTONES).to_arrow_table()
