"""Search of a store, without Ray: which moments look like a text, and whether a model says that they do."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from longvlm.jobs.cluster.activity import doing
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import SearchResult, search, segments_where
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.text_encoder import TextEncoder, load_text_encoder
from longvlm.schemas.errors import InputError

By = Literal["score", "yes"]


@dataclass(frozen=True)
class SearchOrder:
    """What to search for, and where."""

    store: str
    text: str
    limit: int = 10  # hits
    where: str | None = None  # an SQL predicate over the view `segments` and what it says of videos
    verify: str | None = None  # a question that a model answers with yes or no about each hit; "": whether it is there
    model: str | None = None  # which one; None: the one that the store remembers
    by: By = "score"  # which comes first


@dataclass(frozen=True)
class Found:
    """What was found, best first, and what was looked at to find it."""

    hits: list[dict[str, Any]]  # uri, external_id, segment, start_s, end_s, best_s, score and, if verified, yes
    num_scanned: int  # moments
    bytes_scanned: int  # of their vectors
    question: str | None = None  # that was asked about each
    notes: list[str] = field(default_factory=list)


def find_moments(order: SearchOrder) -> Found:
    """Search moments: those of a store whose search vectors are nearest to a text, verified by a model if wanted.

    Raises:
        InputError: the store is empty, its tower has no text encoder, or the model cannot answer.
    """
    doing(f"reading the store {order.store}")
    store = Store.open(order.store)
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    if order.by == "yes" and order.verify is None:
        raise InputError("--by yes sorts by what a model says; add --verify.")
    doing("reading the text")
    encoder = load_text_encoder(active.recipe.tower.name)
    doing("comparing it with all moments")
    snapshot = store.pin()
    within = None if order.where is None else segments_where(snapshot, order.where)
    result = nearest_moments(snapshot, encoder, order.text, order.limit, within)
    hits = [asdict(hit) for hit in result.rows]
    for hit in hits:
        del hit["write_id"]
    if order.verify is None:
        return Found(hits, result.num_scanned, result.bytes_scanned)
    from longvlm.jobs.answer.loaded import LoadedModel
    from longvlm.jobs.query.verify import verify

    doing("asking the model about what was found")
    question = order.verify or f"Is there {order.text}?"
    told = verify(LoadedModel(store, order.model), snapshot, result.rows, question)
    hits = [{**hit, "yes": yes} for hit, yes in zip(hits, told.yes, strict=True)]
    if order.by == "yes":
        hits.sort(key=lambda hit: -1.0 if hit["yes"] is None else hit["yes"], reverse=True)
    return Found(hits, result.num_scanned, result.bytes_scanned, question, [*told.problems, told.calibration])


def nearest_moments(
    snapshot: Snapshot, encoder: TextEncoder, text: str, limit: int, within: pa.Table | None = None
) -> SearchResult:
    """The moments of a snapshot that are nearest to a text, in the words of its tower's encoder. Raises as `search`."""
    return search(snapshot, encoder.encode([text])[0].numpy(), limit, within)
