"""Search: the segments nearest to a query vector, by brute force over stored embeddings in bounded batches.

Up to a million segments a scan takes seconds and needs no index.
"""

from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError

_BATCH_ROWS = 16_384  # 50 MB of 768-d vectors

# what `where` may speak of: a segment and its video
_CANDIDATES = """
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
_EMBEDDINGS = """
SELECT write_id, segment, embedding
FROM ledger_segments SEMI JOIN candidates USING (write_id, segment)
WHERE embedding IS NOT NULL
"""
_FOUND = """
SELECT write_id, segment, uri, external_id, start_s, end_s FROM segments WHERE list_contains($1, write_id)
"""


@dataclass(frozen=True)
class Hit:
    """A segment and how near it is: the cosine, 1 at most."""

    uri: str
    external_id: str | None
    segment: int
    start_s: float
    end_s: float
    score: float


@dataclass(frozen=True)
class SearchResult:
    """The nearest segments, best first, and what was looked at to find them."""

    rows: list[Hit]
    num_scanned: int  # segments
    bytes_scanned: int  # of their embeddings


def search(
    snapshot: Snapshot, query: npt.NDArray[np.float32], limit: int = 10, where: str | None = None
) -> SearchResult:
    """The live segments of the active recipe whose embeddings are nearest to a query by cosine.

    Args:
        snapshot: from `Store.pin`.
        query: [E], of any length but zero.
        limit: how many segments to return at most.
        where: SQL predicate over the columns of the `segments` view and of its video, such as `duration_s > 60`.

    Raises:
        InputError: the store holds no embeddings, they are of another width than the query, the query has no
            direction, or DuckDB refuses the predicate.
    """
    norm = float(np.linalg.norm(query))
    if not norm > 0 or not np.isfinite(norm):
        raise InputError("the query vector is zero or not finite; search for something else.")
    query_E = (query / norm).astype(np.float32)  # noqa: N806 - E: width of the search embedding
    with catalog.connect(snapshot, apart=True) as con:
        access.seal(con, snapshot)  # the predicate is somebody's own SQL
        try:
            sql = _CANDIDATES.format(where=where or "true")
            catalog.check_select(con, sql)
            con.execute(f"CREATE TEMP TABLE candidates AS {sql}")
        except duckdb.Error as error:
            raise InputError(f"the search cannot run: {catalog.without_place(error)}") from error
        best, num_scanned = _scan(con, query_E, limit)
        if not num_scanned:
            _explain_nothing_found(con)
        found = con.execute(_FOUND, [[write_id for _, write_id, _ in best]]).fetchall()
    facts = {(row[0], row[1]): (row[2], row[3], row[1], row[4], row[5]) for row in found}
    hits = [Hit(*facts[write_id, segment], score) for score, write_id, segment in best]
    return SearchResult(hits, num_scanned, num_scanned * query_E.nbytes)


def _scan(
    con: duckdb.DuckDBPyConnection,
    query_E: npt.NDArray[np.float32],  # noqa: N803
    limit: int,
) -> tuple[list[tuple[float, str, int]], int]:
    """The best (score, write id, segment) of the candidates, and how many had an embedding."""
    # left to itself, DuckDB may build its hash table of the embeddings instead of the candidates
    con.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    best: list[tuple[float, str, int]] = []
    num_scanned = 0
    for batch in con.sql(_EMBEDDINGS).to_arrow_reader(_BATCH_ROWS):
        if not batch.num_rows:
            continue
        values = batch["embedding"].flatten().to_numpy(zero_copy_only=False)
        width, rest = divmod(len(values), batch.num_rows)
        if width != len(query_E) or rest:
            raise InputError(
                f"the store's embeddings are {width} wide and the query's is {len(query_E)}; "
                "search with the model that the store was indexed with."
            )
        scores = values.reshape(-1, width) @ query_E
        top = np.argsort(-scores, kind="stable")[:limit]
        keys = [batch[name].take(pa.array(top)).to_pylist() for name in ("write_id", "segment")]
        best = sorted([*best, *zip(scores[top].tolist(), *keys, strict=True)], key=lambda hit: (-hit[0], *hit[1:]))
        best = best[:limit]
        num_scanned += batch.num_rows
    con.execute("RESET disabled_optimizers")
    return best, num_scanned


def _explain_nothing_found(con: duckdb.DuckDBPyConnection) -> None:
    """Nothing was scanned: because of the predicate, an empty store, or a tower that gives no embeddings."""
    counts = con.execute("SELECT count(*), count(embedding) FROM segments").fetchone()
    if counts and counts[0] and not counts[1]:
        raise InputError(
            f"none of the {counts[0]} segments has a search embedding, because the tower they were indexed with has no "
            "text encoder; index the videos with a model whose tower has one (CLIP, SigLIP) to search them."
        )
