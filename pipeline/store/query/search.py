"""Search: the moments nearest to a query vector, by brute force over the stored vectors of all frames.

Up to some millions of moments a scan takes less than a second and needs no index.

Shape letters: M moments, E search channels.
"""

# ruff: noqa: N803, N806 - arrays are named by their shape

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.query.moments import Moments, open_moments
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError

# A hit reaches from its best moment as far as scores are within this much of the best one's, measured in standard
# deviations of all scores: cosines of one query to all there is lie close together, and differently for every query.
JOINED_WITHIN = 0.5
_FIRST_LOOK = 4096  # of the best moments; more are looked at only where these are neighbours of each other

# what a predicate may speak of: a segment and its video
_WHERE = """
SELECT write_id, segment
FROM segments
JOIN (
    SELECT write_id, source, size_bytes, modified_at, duration_s, fps, width, height, codec, decoder, num_segments,
        outdated, indexed_at, run_id
    FROM videos WHERE status = 'indexed'
) USING (write_id)
WHERE (
{where}
)
"""


@dataclass(frozen=True)
class Hit:
    """Neighbouring moments of a video and how near the best of them is: the cosine, 1 at most."""

    uri: str
    external_id: str | None
    segment: int  # of the best moment
    start_s: float
    end_s: float
    best_s: float  # when the frame of the best moment begins to be shown
    score: float
    write_id: str


@dataclass(frozen=True)
class SearchResult:
    """The nearest hits, best first, and what was looked at to find them."""

    rows: list[Hit]
    num_scanned: int  # moments
    bytes_scanned: int  # of their vectors


def search(
    snapshot: Snapshot, query: NDArray[np.float32], limit: int = 10, within: pa.Table | None = None
) -> SearchResult:
    """The live moments of the active recipe that are nearest to a query by cosine, neighbours joined.

    A hit is a moment with its neighbours in time whose scores are within `JOINED_WITHIN` standard deviations of its
    own; what belongs to a better hit is no other one's.

    Args:
        snapshot: from `Store.pin`.
        query: [E], of any length but zero.
        limit: how many hits to return at most.
        within: the segments to search, as `segments_where` gives them; None: all.

    Raises:
        InputError: the store holds no search vectors, they are of another width than the query, or the query has no
            direction.
    """
    norm = float(np.linalg.norm(query))
    if not norm > 0 or not np.isfinite(norm):
        raise InputError("the query vector is zero or not finite; search for something else.")
    moments = open_moments(snapshot)
    if not moments.num_moments:
        _explain_nothing_found(snapshot)
        return SearchResult([], 0, 0)
    scores_M = moments.cosines((query / norm).astype(np.float32))
    if within is not None:
        scores_M[~_is_among(moments, within)] = -np.inf
    num_scanned = int(np.isfinite(scores_M).sum())
    hits = [_hit(moments, scores_M, *span) for span in _spans(scores_M, moments.video, limit)]
    return SearchResult(hits, num_scanned, num_scanned * len(query))


def sql_of_segments(where: str) -> str:
    """The query for the segments for which a predicate holds, as `segments_where` takes it."""
    return _WHERE.format(where=where)


def segments_where(snapshot: Snapshot, where: str) -> pa.Table:
    """The segments for which a predicate holds: write_id and segment.

    Args:
        snapshot: from `Store.pin`.
        where: SQL over the columns of the `segments` view and of its video, such as `duration_s > 60`.

    Raises:
        InputError: DuckDB refuses the predicate.
    """
    with catalog.connect(snapshot, ("segments", "videos"), apart=True) as con:
        access.seal(con, snapshot)  # the predicate is somebody's own SQL
        sql = sql_of_segments(where)
        try:
            catalog.check_select(con, sql)
            return con.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise InputError(f"the search cannot run: {catalog.without_place(error)}") from error


def _is_among(moments: Moments, chosen: pa.Table) -> NDArray[np.bool_]:
    """Which moments are of chosen segments, [M]."""

    def keys(rows: pa.Table) -> pa.ChunkedArray:
        return pc.binary_join_element_wise(rows["write_id"], pc.cast(rows["segment"], pa.string()), "/")

    is_chosen_S = pc.is_in(keys(moments.segments), keys(chosen).combine_chunks()).to_numpy()
    return np.asarray(is_chosen_S[moments.segment])


def _spans(scores_M: NDArray[np.float32], video_M: NDArray[np.int64], limit: int) -> list[tuple[int, int, int]]:
    """The hits, best first: each its best, first and last moment."""
    scanned = scores_M[np.isfinite(scores_M)]
    within = JOINED_WITHIN * float(scanned.std()) if len(scanned) else 0.0
    num_looked = min(_FIRST_LOOK, len(scores_M))
    while True:
        hits = _joined(scores_M, video_M, _best(scores_M, num_looked), within, limit)
        if len(hits) == limit or num_looked == len(scores_M):
            return hits
        num_looked = min(8 * num_looked, len(scores_M))


def _best(scores_M: NDArray[np.float32], number: int) -> list[int]:
    """The best so many moments that were scanned, best first and of equals the earlier."""
    places = np.argpartition(-scores_M, number - 1)[:number]
    places = np.sort(places[np.isfinite(scores_M[places])])
    return places[np.argsort(-scores_M[places], kind="stable")].tolist()


def _joined(
    scores_M: NDArray[np.float32], video_M: NDArray[np.int64], best: list[int], within: float, limit: int
) -> list[tuple[int, int, int]]:
    """Hits of the moments `best`, taken in their order, until there are enough."""
    hits: list[tuple[int, int, int]] = []
    is_taken_M = np.zeros(len(scores_M), bool)
    for place in best:
        if len(hits) == limit:
            break
        if is_taken_M[place]:
            continue
        start, end = (int(np.searchsorted(video_M, video_M[place], side)) for side in ("left", "right"))
        is_apart = (scores_M[start:end] < scores_M[place] - within) | is_taken_M[start:end]
        before, after = np.flatnonzero(is_apart[: place - start]), np.flatnonzero(is_apart[place - start :])
        first = start + int(before[-1]) + 1 if len(before) else start
        last = place + int(after[0]) - 1 if len(after) else end - 1
        hits.append((place, first, last))
        is_taken_M[first : last + 1] = True
    return hits


def _hit(moments: Moments, scores_M: NDArray[np.float32], best: int, first: int, last: int) -> Hit:
    row = {name: moments.segments[name][int(moments.segment[best])].as_py() for name in moments.segments.column_names}
    return Hit(
        row["uri"],
        row["external_id"],
        row["segment"],
        float(moments.starts_s[first]),
        float(moments.end_s(last)),
        float(moments.times_s[best]),
        float(scores_M[best]),
        row["write_id"],
    )


def _explain_nothing_found(snapshot: Snapshot) -> None:
    """Nothing can be scanned: because the store is empty, or its tower gives no search vectors."""
    with catalog.connect(snapshot, ("segments",)) as con:
        counts = con.execute("SELECT count(*) FROM segments").fetchone()
    if counts and counts[0]:
        raise InputError(
            f"none of the {counts[0]} segments has a search embedding, because the tower they were indexed with has no "
            "text encoder; index the videos with a model whose tower has one (CLIP, SigLIP) to search them."
        )
