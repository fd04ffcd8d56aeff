"""Whose rows go when some videos are forgotten: those of their names, and of the writes that moved along with them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
from duckdb import DuckDBPyConnection

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
# Nothing comes after the tombstone of a name that is kept out. Under an old name another video may come at any time,
# and under one whose tombstone was lifted: so rows go by their writes, of the ledger by `seq`, and never by name alone.
_FAMILY = """
CREATE TEMP TABLE named_writes AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN asked USING (video_id) WHERE write_id IS NOT NULL;

CREATE TEMP TABLE kept_out AS
FROM asked UNION SELECT video_id FROM live_videos SEMI JOIN named_writes USING (write_id)
UNION SELECT video_id FROM ledger_videos SEMI JOIN named_writes USING (write_id)
SEMI JOIN (FROM deletions WHERE is_forgotten) USING (video_id);

CREATE TEMP TABLE old_names AS
SELECT DISTINCT video_id FROM ledger_videos SEMI JOIN named_writes USING (write_id) ANTI JOIN kept_out USING (video_id);

CREATE TEMP TABLE vacant AS
FROM old_names ANTI JOIN live_videos USING (video_id);

CREATE TEMP TABLE writes AS
SELECT DISTINCT write_id FROM ledger_videos SEMI JOIN (FROM kept_out UNION FROM vacant) USING (video_id)
ANTI JOIN (SELECT write_id FROM live_videos ANTI JOIN kept_out USING (video_id)) USING (write_id)
WHERE write_id IS NOT NULL;
"""
# Which rows of a table are a family's, as `VideoFamily.are_theirs`. Of the ledger the tombstones stay, and what lifted
# those of an old name, of which neither has a uri.
THEIRS = dict.fromkeys(ERASED, "write_id IN (SELECT write_id FROM writes)") | {
    "videos": f"""
    write_id IN (SELECT write_id FROM writes) OR seq <= (SELECT seq FROM looked) AND (
        video_id IN (SELECT video_id FROM kept_out) AND coalesce(error_code, '') <> '{FORGOTTEN}'
        OR video_id IN (SELECT video_id FROM vacant) AND uri IS NOT NULL
    )
    """
}
_NOT_LIVE = """
SELECT DISTINCT write_id FROM (
    SELECT video_id, write_id FROM ledger_tokens
    UNION ALL SELECT video_id, write_id FROM ledger_segments
    UNION ALL SELECT video_id, write_id FROM ledger_answers
    UNION ALL SELECT video_id, write_id FROM ledger_verdicts
) SEMI JOIN (FROM kept_out UNION FROM old_names) USING (video_id)
ANTI JOIN (SELECT write_id FROM live_videos) USING (write_id)
WHERE write_id IS NOT NULL ORDER BY write_id
"""
# Who is kept out: the videos themselves, and the names under which they are live now; with what tells their content
# from others', for a file that comes back under another name is the same one. Who is erased once more after that was
# proved needs a tombstone that is not: a proved one may be lifted meanwhile.
_TOMBSTONES = f"""
SELECT video_id, arg_max(source, seq) FILTER (source IS NOT NULL) AS source,
    unnest(arg_max({{'etag': etag, 'size_bytes': size_bytes, 'modified_at': modified_at}}, seq)
        FILTER (status <> 'deleted' OR error_code = '{FORGOTTEN}' AND size_bytes > 0))
FROM kept_out LEFT JOIN ledger_videos USING (video_id)
WHERE video_id NOT IN (
    SELECT video_id FROM ledger_videos SEMI JOIN (FROM deletions WHERE is_forgotten) USING (video_id)
    WHERE error_code = '{FORGOTTEN}' GROUP BY video_id HAVING arg_max(coalesce(error, ''), seq) <> '{PROVED}'
)
GROUP BY video_id
"""


def looking_at_all(snapshot: Snapshot, views: Collection[str] = ()) -> DuckDBPyConnection:
    """A connection whose queries look at every row: a bit that flips in a footer hides none."""
    return catalog.connect(snapshot, views, trusts_footers=False)


@dataclass(frozen=True)
class VideoFamily:
    """Whose rows go: those of some videos, and of some writes under whatever name."""

    kept_out: pa.Array  # videos that have tombstones, or are to have them
    old_names: pa.Array  # those that shared a write with these, and are not kept out
    vacant: pa.Array  # of these: where no other video is live
    write_ids: pa.Array
    seq: int  # the largest of the ledger that was looked at: what it was told of a name later is another video's

    @property
    def num_names(self) -> int:
        """How many names are erased."""
        return len(self.kept_out) + len(self.vacant)

    def register(self, con: DuckDBPyConnection) -> None:
        """Show it to a database, as `THEIRS` reads it."""
        for name in ("kept_out", "old_names", "vacant"):
            con.register(name, pa.table({"video_id": getattr(self, name)}))
        con.register("writes", pa.table({"write_id": self.write_ids}))
        con.register("looked", pa.table({"seq": [self.seq]}))

    def are_theirs(self, table: str, rows: pa.Table) -> pa.ChunkedArray:
        """Which rows of a table go."""
        are_written = pc.is_in(rows["write_id"], self.write_ids)
        if table != "videos":
            return are_written
        is_tombstone = pc.equal(pc.fill_null(rows["error_code"], ""), FORGOTTEN)
        are_own = pc.and_not(pc.is_in(rows["video_id"], self.kept_out), is_tombstone)
        are_old = pc.and_(pc.is_in(rows["video_id"], self.vacant), pc.is_valid(rows["uri"]))
        return pc.or_(are_written, pc.and_(pc.or_(are_own, are_old), pc.less_equal(rows["seq"], self.seq)))

    def may_be_theirs(self, table: str, rows: pa.Table) -> pa.ChunkedArray:
        """Which rows of a file that no log names may be theirs: all under their names, whatever the write."""
        are_named = pc.or_(*(pc.is_in(rows["video_id"], names) for names in (self.kept_out, self.old_names)))
        if table == "videos":
            are_named = pc.and_(are_named, pc.is_valid(rows["uri"]))  # tombstones may stay
        return pc.or_(are_named, self.are_theirs(table, rows))

    def without(self, table: str, rows: pa.Table) -> pa.Table:
        """The rows of others."""
        return rows.filter(pc.invert(self.are_theirs(table, rows)))

    def holders(self, table: str, files: Sequence[DataFile]) -> list[DataFile]:
        """Which files of a table hold rows that go; only ids are read."""
        if not files:
            return []
        with looking_at_all(Snapshot({table: PinnedTable(0, tuple(files))})) as con:
            self.register(con)
            rows = catalog.rows_of(file.uri for file in files)
            found = {
                uri for (uri,) in con.execute(f"SELECT DISTINCT filename FROM {rows} WHERE {THEIRS[table]}").fetchall()
            }
        return [file for file in files if file.uri in found]

    def not_live(self, snapshot: Snapshot) -> list[str]:
        """The writes under their names, in all tables of ERASED, that are not live: they died, or never were."""
        with looking_at_all(snapshot, ("live_videos",)) as con:
            self.register(con)
            return [write_id for (write_id,) in con.execute(_NOT_LIVE).fetchall()]

    def with_writes(self, write_ids: Sequence[str]) -> "VideoFamily":
        """It and the rows of some more writes."""
        return replace(self, write_ids=pa.concat_arrays([self.write_ids, pa.array(write_ids, pa.string())]))


def find_family(snapshot: Snapshot, video_ids: Sequence[str]) -> tuple[VideoFamily, pa.Table]:
    """All that is theirs by the ledger, and who is to be kept out and is not yet (video_id, source, content)."""
    with looking_at_all(Snapshot({"videos": snapshot.table("videos")}), ("live_videos",)) as con:
        con.register("asked", pa.table({"video_id": pa.array(video_ids, pa.string())}))
        con.execute(_FAMILY)
        names = ("kept_out", "old_names", "vacant", "writes")
        found = (con.sql(f"FROM {name}").to_arrow_table()[0].combine_chunks() for name in names)
        kept_out, old_names, vacant, writes = found
        family = VideoFamily(kept_out, old_names, vacant, writes, snapshot.newest_seq("videos"))
        return family, con.sql(_TOMBSTONES).to_arrow_table()
