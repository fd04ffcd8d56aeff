"""A listing held against the ledger, in DuckDB: what is new, changed, moved, gone, and what is left to do."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.look import PROVED, Look
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import ANY_CODE
from longvlm.schemas.rows import WorkRow
from longvlm.schemas.sql_text import quoted

_STAMP_S = 0.002  # two milliseconds: a length made of stamps in milliseconds may be off by that much
_MEMORY_GB = 1.5  # of DuckDB's; a listing and a ledger of a million rows fit, more goes to disk

_SAME_CONTENT = """content_of({a}.size_bytes, {a}.etag, {a}.modified_at)
    IS NOT DISTINCT FROM content_of({b}.size_bytes, {b}.etag, {b}.modified_at)"""

# Before rows said by which rule, frames were taken by even spread and not by their time stamps: at a constant rate the
# same ones, else others. Such a row tells a rate that is not constant by its length: rates that are constant are whole,
# or half, or 1000/1001 of a whole number a second, or a frame every so many seconds. Containers count in milliseconds.
_OF_OLD_TIMES = f"""time_rule IS NULL AND num_frames > 1 AND least(
        abs(duration_s - num_frames / (greatest(round(2 * fps), 1) / 2)),
        abs(duration_s - num_frames * 1.001 / greatest(round(1.001 * fps), 1)),
        abs(duration_s - num_frames * greatest(round(1 / fps), 1))
    ) > {_STAMP_S}"""

_KNOWN = f"""
CREATE TEMP TABLE known AS  -- the newest row of each video and recipe that is not deleted
SELECT n.video_id, recipe, status, error_code, attempts, uri, etag, size_bytes, modified_at, n.seq,
    -- of the source that it is live from: one that lists it too, and failed to read it, has nothing to be deleted
    CASE WHEN status = 'failed' THEN coalesce(l.source, n.source) ELSE n.source END AS source,
    coalesce({_OF_OLD_TIMES}, false) AS is_of_old_times
FROM newest_rows n
LEFT JOIN (SELECT video_id, arg_max(source, seq) AS source FROM live_videos GROUP BY video_id) l USING (video_id)
WHERE recipe IS NOT NULL AND status <> 'deleted';

CREATE TEMP TABLE gone AS  -- videos of this source that the listing lacks, and of which nothing is newer than that
SELECT video_id, any_value(uri) AS uri FROM known ANTI JOIN listed USING (video_id)
WHERE source = $home GROUP BY video_id HAVING max(seq) <= $listed_seq;
"""
_STILL_THERE = "SELECT DISTINCT video_id FROM known SEMI JOIN listed USING (video_id) WHERE source = ?"

# A video that appeared is one that is gone if their content is the same. Of several with one etag each finds another.
# Without etags size and time are all there is: two files of an archive may well share these, so that only one that has
# them alone is taken for the one that is gone.
_MOVES = f"""
CREATE TEMP TABLE forgotten_again AS  -- under another name, but for copies that were known before
WITH forgotten AS (
    SELECT DISTINCT content_of(size_bytes, etag, modified_at) AS content FROM ledger_videos
    SEMI JOIN (FROM deletions WHERE is_forgotten) USING (video_id) WHERE status = 'deleted' AND size_bytes > 0
)
SELECT video_id FROM (
    SELECT video_id, etag, content_of(size_bytes, etag, modified_at) AS content,
        count(*) OVER (PARTITION BY content) AS alike
    FROM listed WHERE size_bytes > 0 AND (nullif(etag, '') IS NOT NULL OR modified_at IS NOT NULL)
) SEMI JOIN forgotten USING (content)
ANTI JOIN (SELECT video_id, content_of(size_bytes, etag, modified_at) AS content FROM known) USING (video_id, content)
WHERE nullif(etag, '') IS NOT NULL OR alike = 1;

CREATE TEMP TABLE moves AS
WITH appeared AS (
    SELECT *, row_number() OVER (PARTITION BY content ORDER BY uri) AS nth,
        count(*) OVER (PARTITION BY content) AS alike
    FROM (
        SELECT video_id, uri, etag, content_of(size_bytes, etag, modified_at) AS content
        FROM listed ANTI JOIN known USING (video_id)
        WHERE size_bytes > 0 AND (nullif(etag, '') IS NOT NULL OR modified_at IS NOT NULL)
            AND video_id NOT IN (SELECT video_id FROM deletions WHERE is_forgotten)
            AND video_id NOT IN (FROM forgotten_again)
    )
),
left_behind AS (
    SELECT *, row_number() OVER (PARTITION BY content ORDER BY uri) AS nth,
        count(*) OVER (PARTITION BY content) AS alike
    FROM (
        SELECT DISTINCT video_id, uri, content_of(size_bytes, etag, modified_at) AS content
        FROM live_videos SEMI JOIN gone USING (video_id)
    )
)
SELECT a.video_id, b.video_id AS old_id FROM appeared a JOIN left_behind b USING (content, nth)
WHERE nullif(a.etag, '') IS NOT NULL OR (a.alike = 1 AND b.alike = 1);

CREATE TEMP TABLE judged AS
SELECT l.video_id,
    CASE
        WHEN l.video_id IN (SELECT video_id FROM deletions WHERE is_forgotten) THEN 'forgotten'
        WHEN l.video_id IN (FROM forgotten_again) THEN 'forgotten'
        WHEN is_same AND k.status = 'indexed' AND m.old_id IS NOT NULL THEN 'moved'
        WHEN is_same AND k.status = 'indexed' AND NOT ($by_time AND k.is_of_old_times) THEN 'unchanged'
        WHEN is_same AND k.status = 'indexed' AND NOT $restale THEN 'mistimed'
        WHEN is_same AND k.status <> 'indexed' AND NOT list_has_any($retry, ['{ANY_CODE}', coalesce(k.error_code, '')])
            THEN 'known_failed'
        WHEN k.video_id IS NULL AND NOT $restale AND is_elsewhere THEN 'stale'
        ELSE 'work'
    END AS way,
    CASE WHEN is_same THEN coalesce(k.attempts, 0) ELSE 0 END AS attempts
FROM (
    SELECT l.*, coalesce(m.old_id, l.video_id) AS known_as, EXISTS (
        FROM known e
        WHERE e.video_id = coalesce(m.old_id, l.video_id) AND e.recipe <> $recipe AND e.status = 'indexed'
            AND {_SAME_CONTENT.format(a="e", b="l")}
    ) AS is_elsewhere
    FROM listed l LEFT JOIN moves m USING (video_id)
) l
LEFT JOIN moves m USING (video_id)
LEFT JOIN (
    FROM known WHERE recipe = $recipe
) k ON k.video_id = l.known_as
CROSS JOIN LATERAL (SELECT k.video_id IS NOT NULL AND {_SAME_CONTENT.format(a="k", b="l")} AS is_same);
"""
_WORK = """
CREATE TEMP TABLE work AS
SELECT l.*, j.attempts::INTEGER AS attempts, row_number() OVER (ORDER BY l.uri) - 1 AS n
FROM listed l JOIN judged j USING (video_id) WHERE j.way = 'work'
"""
# Nobody knows how long a video is before it is watched, unless this content was watched before, under any recipe.
_WORKLOAD = f"""
SELECT count(*) AS videos, coalesce(sum(w.size_bytes), 0)::BIGINT AS size_bytes,
    coalesce(sum(k.duration_s), 0.0) AS known_s,
    coalesce(sum(w.size_bytes) FILTER (k.duration_s IS NULL), 0)::BIGINT AS unknown_bytes,
    count(*) FILTER (k.duration_s IS NULL AND w.size_bytes IS NULL) AS num_unknown_sizes
FROM work w LEFT JOIN (
    SELECT video_id, etag, size_bytes, modified_at, max(duration_s) AS duration_s
    FROM ledger_videos WHERE duration_s > 0 GROUP BY ALL
) k ON k.video_id = w.video_id AND {_SAME_CONTENT.format(a="k", b="w")}
WHERE w.n < ?
"""
_ADOPTED = f"""
SELECT v.* EXCLUDE (outdated) REPLACE (
    l.video_id AS video_id, l.source AS source, l.uri AS uri, l.external_id AS external_id,
    l.modified_at AS modified_at, $run_id AS run_id
)
FROM moves m JOIN listed l USING (video_id)
JOIN live_videos v ON v.video_id = m.old_id AND {_SAME_CONTENT.format(a="v", b="l")}
"""
_DELETED = """
SELECT video_id, $home AS source, uri, 'deleted' AS status, $run_id AS run_id,
    now()::TIMESTAMPTZ AT TIME ZONE 'UTC' AS indexed_at
FROM gone WHERE $prune OR video_id IN (SELECT old_id FROM moves)
"""
# An erasure that is not proved may still be under way, and would go on with what is indexed of the video from here on.
_LIFTED = f"""
SELECT video_id, $home AS source, 'deleted' AS status, $run_id AS run_id,
    now()::TIMESTAMPTZ AT TIME ZONE 'UTC' AS indexed_at
FROM (
    SELECT video_id, arg_max(source, seq) AS source,
        arg_max(content_of(size_bytes, etag, modified_at), seq) FILTER (size_bytes > 0) AS content
    FROM ledger_videos WHERE status = 'deleted' GROUP BY video_id
    HAVING max(seq) <= $listed_seq AND arg_max(coalesce(error, ''), seq) = '{PROVED}'
) SEMI JOIN (FROM deletions WHERE is_forgotten) USING (video_id) ANTI JOIN listed USING (video_id)
WHERE $prune AND source = $home
    AND NOT coalesce(content IN (SELECT content_of(size_bytes, etag, modified_at) FROM listed), false)
"""


@dataclass(frozen=True)
class ChangeCriteria:
    """The criteria by which files of a listing count as work, as unchanged or as gone."""

    recipe: str  # fingerprint
    home: str  # of the source that was listed, completely
    covers: Callable[[str], bool] | None = None  # whether the listing would show a uri, were it there; None: every one
    retry_failed: tuple[str, ...] = ()  # codes, or ANY_CODE: what failed of them at this same content is tried again
    restale: bool = False  # index also what is indexed at this same content, but stale
    is_manifest: bool = False  # which may leave out a file that is there
    by_time: bool = True  # whether the recipe takes frames by their times, and not by their numbers
    listed_seq: int = sys.maxsize  # the largest seq that the ledger held when the listing began


class Changes:
    """What has become of a source since it was indexed. Close it: it holds a database."""

    def __init__(self, con: duckdb.DuckDBPyConnection, criteria: ChangeCriteria, num_still_there: int) -> None:
        self.con = con
        self.criteria = criteria
        counts = dict(con.execute("SELECT way, count(*) FROM judged GROUP BY way").fetchall())
        self.num_work: int = counts.pop("work", 0)
        self.num_mistimed: int = counts.pop("mistimed", 0)  # stale, since their frames were not taken by time stamps
        if self.num_mistimed:
            counts["stale"] = counts.get("stale", 0) + self.num_mistimed
        self.others: dict[str, int] = counts  # listed, not work: unchanged, moved, known_failed, stale, forgotten
        self.num_moves: int = _number(con, "FROM moves")
        num_gone = _number(con, "FROM gone")
        self.num_known = num_still_there + num_gone  # videos of this source in the ledger
        self.num_gone = num_gone - _number(con, "SELECT DISTINCT old_id FROM moves")
        ((seq,),) = con.execute("SELECT coalesce(max(seq), 0) FROM ledger_videos").fetchall()
        self.look = Look(seq, dict(con.execute("FROM moves").fetchall()))

    def waves(self, num_videos: int, limit: int | None = None) -> Iterator[list[WorkRow]]:
        """The work in the order of uris, so many videos at a time: tables.LISTING, and `attempts` at this content."""
        end = self._end(limit)
        for start in range(0, end, num_videos):
            sql = "SELECT * EXCLUDE (n) FROM work WHERE n >= ? AND n < ? ORDER BY n"
            yield self.con.sql(sql, params=[start, min(start + num_videos, end)]).to_arrow_table().to_pylist()

    def draw(self, number: int, seed: int, limit: int | None = None) -> pa.Table:
        """Some of the work at random, in the order of uris: tables.LISTING. Equal seeds draw equal videos."""
        end = self._end(limit)
        drawn = np.random.default_rng(seed).choice(end, min(number, end), replace=False).tolist()
        names = ", ".join(tables.LISTING.names)
        sql = f"SELECT {names} FROM work WHERE list_contains(?, n) ORDER BY n"
        return self.con.sql(sql, params=[drawn]).to_arrow_table()

    def workload(self, limit: int | None = None) -> dict[str, float]:
        """How much the work is: videos, size_bytes, and how much of it has a known length.

        `known_s` are the seconds of the videos that were watched before at this same content. Of the others there are
        `unknown_bytes` and, where the source does not tell sizes, `num_unknown_sizes`.
        """
        (found,) = self.con.sql(_WORKLOAD, params=[self._end(limit)]).to_arrow_table().to_pylist()
        return found

    def bookkeeping(self, run_id: str, *, prune: bool) -> pa.Table:
        """The rows of tables.VIDEOS that need no watching.

        A moved video takes over the writes of the one that is gone, which is deleted in the same commit. With `prune`
        what else is gone is deleted, and what was forgotten is so no longer once its file is gone, under any name.
        """
        # What was forgotten has no uri, so that nobody knows what patterns would say to it; and that a manifest does
        # not list it is no proof that it is gone.
        proves = self.criteria.covers is None and not self.criteria.is_manifest
        lifted = _LIFTED if proves else f"{_LIFTED} AND false"
        values = {"home": self.criteria.home, "run_id": run_id, "prune": prune, "listed_seq": self.criteria.listed_seq}
        parts = " UNION ALL BY NAME ".join(f"({part})" for part in (_ADOPTED, _DELETED, lifted))
        sql = f"(FROM ledger_videos WHERE false) UNION ALL BY NAME {parts}"
        return self.con.sql(sql, params=values).to_arrow_table().cast(tables.VIDEOS)

    def _end(self, limit: int | None) -> int:
        return self.num_work if limit is None else min(limit, self.num_work)

    def close(self) -> None:
        """Give the database back."""
        self.con.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compare(listing: str, snapshot: Snapshot, criteria: ChangeCriteria) -> Changes:
    """Hold a complete listing of a source against what a store knows of it.

    Neither comes into Python row by row, so that millions fit: both are joined in DuckDB, within `_MEMORY_GB`.

    Args:
        listing: path of a parquet file of tables.LISTING, each video once.
        snapshot: with the table `videos`.
        criteria: by which files count as work, as unchanged or as gone.
    """
    con = catalog.connect(snapshot, ("live_videos", "newest_rows"), apart=True)
    con.execute(f"SET memory_limit = '{_MEMORY_GB}GB'")
    con.execute(f"SET temp_directory = {quoted(tempfile.gettempdir())}")
    con.execute(f"CREATE TEMP VIEW listed AS FROM {catalog.rows_of([listing])}")
    for statement in _KNOWN.split(";")[:-1]:
        values = {"home": criteria.home, "listed_seq": criteria.listed_seq}
        con.execute(statement, values if "$home" in statement else None)
    if criteria.covers is not None:
        _leave_out_uncovered(con, criteria.covers)
    num_still_there = _number(con, _STILL_THERE, [criteria.home])
    for statement in _MOVES.split(";")[:-1]:
        values = {"retry": list(criteria.retry_failed), "restale": criteria.restale, "recipe": criteria.recipe}
        values["by_time"] = criteria.by_time
        con.execute(statement, values if "$recipe" in statement else None)
    con.execute(_WORK)
    changes = Changes(con, criteria, num_still_there)
    con.execute("DROP TABLE known; DROP TABLE judged")  # a run takes hours, and needs the memory for other things
    return changes


def _leave_out_uncovered(con: duckdb.DuckDBPyConnection, covers: Callable[[str], bool]) -> None:
    """Videos that this listing's patterns do not let through are not gone because they are not listed."""
    gone = con.sql("FROM gone").to_arrow_table()
    con.register("covered", gone.filter(pa.array([covers(uri) for uri in gone["uri"].to_pylist()], pa.bool_())))
    con.execute("CREATE OR REPLACE TEMP TABLE gone AS FROM covered")
    con.unregister("covered")


def _number(con: duckdb.DuckDBPyConnection, rows: str, values: list[str] | None = None) -> int:
    """How many rows a query has."""
    return int(con.execute(f"SELECT count(*) FROM ({rows})", values).fetchall()[0][0])
