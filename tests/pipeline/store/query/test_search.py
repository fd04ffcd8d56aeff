import numpy as np
import pyarrow as pa
import pytest
import stores
from stores import segment, unit

from longvlm.pipeline.store.query import search as module
from longvlm.pipeline.store.query.search import search
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_write_id


def vectors(made: pa.Table) -> np.ndarray:
    return np.array([part["embedding"] for row in made["segments"].to_pylist() for part in row], np.float32)


@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_the_nearest_segments_come_first_whatever_the_batches(store, monkeypatch, batch_rows):
    monkeypatch.setattr(module, "_BATCH_ROWS", batch_rows)
    made = stores.index(store, [f"v{i}" for i in range(10)])
    query = np.random.default_rng(5).normal(size=stores.WIDTH)
    result = search(store.pin(), query, limit=6)
    scores = vectors(made) @ (query / np.linalg.norm(query))
    order = np.argsort(-scores)[:6]
    assert [(hit.uri, hit.segment) for hit in result.rows] == [(stores.uri_of(f"v{i // 4}"), i % 4) for i in order]
    np.testing.assert_allclose([hit.score for hit in result.rows], scores[order], atol=1e-6)
    best = result.rows[0]
    assert (best.start_s, best.end_s) == (best.segment * 10.0, best.segment * 10.0 + 10)
    assert best.external_id == "x-" + best.uri.split("/")[-1].removesuffix(".mp4")
    assert (result.num_scanned, result.bytes_scanned) == (40, 40 * stores.WIDTH * 4)


def test_where_chooses_among_segments_and_their_videos(store):
    made = stores.index(store, ["a", "b"])
    query = vectors(made)[1]
    where = "external_id = 'x-b' AND duration_s > 39 AND start_s >= 10 -- the rest of b"
    result = search(store.pin(), query, where=where)
    assert {(hit.uri, hit.segment) for hit in result.rows} == {(stores.uri_of("b"), i) for i in (1, 2, 3)}
    assert result.num_scanned == 3
    assert search(store.pin(), query, where="duration_s > 1e6").rows == []


def test_only_live_segments_of_the_active_recipe_are_found(store):
    stores.index(store, ["a", "b"], seed=1)
    stores.index(store, ["a"], seed=2)
    stores.index(store, ["a"], stores.TINY, seed=3)
    store.append("videos", stores.deleted(["b"]))
    result = search(store.pin(), np.ones(stores.WIDTH, np.float32))
    assert result.num_scanned == 4
    assert {hit.uri for hit in result.rows} == {stores.uri_of("a")}


def test_an_empty_store_has_nothing_near():
    assert search(Snapshot(), np.ones(4, np.float32)).rows == []


def test_without_embeddings_the_sentence_says_why_and_what_to_do(store):
    made = stores.encoded(["a"], embedded=False)
    outcomes = write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["a"], stores.LONG.fingerprint))
    with pytest.raises(InputError, match=r"none of the 4 segments .* no text encoder; index"):
        search(store.pin(), np.ones(stores.WIDTH, np.float32))


def test_segments_without_an_embedding_are_passed_over(store):
    random = np.random.default_rng(0)
    parts = [segment(0, random), segment(1, random, embedded=False), segment(2, random)]
    made = pa.Table.from_pylist([unit("a", new_write_id(), segments=parts)], tables.ENCODED)
    outcomes = write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["a"], stores.LONG.fingerprint))
    result = search(store.pin(), np.array(parts[2]["embedding"]))
    assert [hit.segment for hit in result.rows] == [2, 0]


def test_another_width_names_both(store):
    stores.index(store, ["a"])
    with pytest.raises(InputError, match=r"16 wide and the query's is 8"):
        search(store.pin(), np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("nope = 1", "Binder Error"),
        ("ur = 'x'", 'Candidate bindings: .*"uri"'),
        ("1) UNION SELECT (1", "search cannot run"),
        ("true); DROP VIEW videos; (", "cannot"),
        ("EXISTS (FROM read_text('/etc/passwd'))", "Cannot access file"),
    ],
)
def test_a_predicate_that_is_none_is_refused(store, where, sentence):
    with pytest.raises(InputError, match=sentence):
        search(store.pin(), np.ones(stores.WIDTH, np.float32), where=where)


def test_a_query_without_direction_is_refused():
    with pytest.raises(InputError, match="zero"):
        search(Snapshot(), np.zeros(4, np.float32))
