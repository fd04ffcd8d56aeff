import os
import tempfile

import numpy as np
import pyarrow as pa
import pytest
import stores
from hypothesis import given
from hypothesis import strategies as st
from stores import segment, unit

from longvlm.pipeline.store.query import moments
from longvlm.pipeline.store.query import search as module
from longvlm.pipeline.store.query.search import search, segments_where
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_write_id


def vectors(made: pa.Table) -> np.ndarray:
    return np.array([part["embedding"] for row in made["segments"].to_pylist() for part in row], np.float32)


@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_segments_of_before_are_moments_and_the_nearest_come_first_whatever_the_batches(store, monkeypatch, batch_rows):
    monkeypatch.setattr(moments, "_SEGMENTS_PER_BATCH", batch_rows)
    monkeypatch.setattr(moments, "_ROWS_AT_ONCE", min(batch_rows, 3))
    monkeypatch.setattr(module, "JOINED_WITHIN", 0)
    made = stores.index(store, [f"v{i}" for i in range(10)])
    query = np.random.default_rng(5).normal(size=stores.WIDTH)
    result = search(store.pin(), query, limit=6)
    scores = vectors(made) @ (query / np.linalg.norm(query))
    best = result.rows[0]
    assert (best.uri, best.segment) == (stores.uri_of(f"v{scores.argmax() // 4}"), scores.argmax() % 4)
    assert best.start_s <= best.best_s == best.segment * 10.0 < best.end_s
    assert best.external_id == "x-" + best.uri.split("/")[-1].removesuffix(".mp4")
    found = [scores[int(hit.uri[9:-4]) * 4 + hit.segment] for hit in result.rows]
    assert found == sorted(found, reverse=True)
    np.testing.assert_allclose([hit.score for hit in result.rows], found, atol=0.01)
    assert (result.num_scanned, result.bytes_scanned) == (40, 40 * stores.WIDTH)


SCORES = st.lists(st.integers(-20, 20), min_size=1, max_size=40)


@given(st.lists(SCORES, min_size=1, max_size=5), st.integers(1, 6))
def test_hits_are_runs_of_one_video_that_touch_no_other_one(videos, limit):
    scores = np.array([score for video in videos for score in video], np.float32)
    video = np.repeat(np.arange(len(videos)), [len(one) for one in videos])
    hits = module._spans(scores, video, limit)
    assert len(hits) == min(limit, len(hits))
    peaks = [scores[best] for best, _, _ in hits]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] == scores.max()
    owned = np.full(len(scores), -1)
    for number, (best, first, last) in enumerate(hits):
        assert first <= best <= last
        assert video[first] == video[last]
        assert (owned[first : last + 1] == -1).all()
        owned[first : last + 1] = number
        assert scores[first : last + 1].max() == scores[best]
        assert scores[first : last + 1].min() >= scores[best] - module.JOINED_WITHIN * scores.std() - 1e-4
    if len(hits) < limit:  # then all there is belongs to one
        assert (owned >= 0).all()
    assert module._spans(scores, video, limit + 3)[: len(hits)] == hits


def framed(store, scores: list[list[float]]) -> None:
    """A video of segments whose frames, a second each, have these cosines to the first axis."""
    parts = []
    for number, of_segment in enumerate(scores):
        rows = np.zeros((len(of_segment), stores.WIDTH))
        rows[:, 0], rows[:, 1] = of_segment, np.sqrt(1 - np.square(of_segment))
        as_int8 = np.rint(rows / np.abs(rows).max(axis=1, keepdims=True) * 127).astype(np.int8)
        start_s = number * 10.0
        times_s = [start_s + 0.25 + i for i in range(len(of_segment))]
        part = segment(number, np.random.default_rng(0))
        frames = [number * 100 + i for i in range(len(of_segment))]
        parts.append({**part, "frames": frames, "times_s": times_s, "frame_embeddings": as_int8.tobytes()})
    made = pa.Table.from_pylist([unit("a", new_write_id(), segments=parts)], tables.ENCODED)
    outcomes = write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["a"], stores.LONG.fingerprint))


def test_a_hit_is_the_seconds_around_its_best_one_across_segments(store):
    framed(store, [[0.1] * 7 + [0.1, 0.9, 0.93], [0.95, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    axis = np.eye(stores.WIDTH)[0]
    first, second = search(store.pin(), axis, limit=2).rows
    assert (first.start_s, first.best_s, first.end_s, first.segment) == (8.25, 10.25, 11.25, 1)
    assert (second.start_s, second.best_s, second.end_s) == (14.25, 14.25, 15.25)
    assert first.score == pytest.approx(0.95, abs=0.01)
    (whole,) = search(store.pin(), np.eye(stores.WIDTH)[2], limit=5).rows  # nothing stands out
    assert (whole.start_s, whole.end_s) == (0.0, 20.0)


def test_the_vectors_of_a_snapshot_are_laid_out_once_and_those_of_before_go(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    stores.index(store, ["a"])
    query = np.ones(stores.WIDTH)
    search(store.pin(), query)
    (first,) = tmp_path.glob("longvlm-search-*/*")
    made = first.stat().st_mtime_ns, first.stat().st_ino
    search(store.pin(), query)
    store.append("answers", tables.ANSWERS.empty_table())
    search(store.pin(), query)
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == made
    old = store.pin()
    left, under_way = (first.with_name(f"{first.stem}-{name}.draft") for name in ("left", "now"))
    for draft in (left, under_way):
        draft.write_bytes(b"half")
    os.utime(left, (1, 1))  # of who was killed
    stores.index(store, ["b"])
    assert search(store.pin(), query).num_scanned == 8
    assert not left.exists()
    under_way.unlink()
    (second,) = tmp_path.glob("longvlm-search-*/*")
    assert second != first
    assert search(old, query).num_scanned == 4  # of a reader that pinned before
    (third,) = tmp_path.glob("longvlm-search-*/*")
    third.write_bytes(third.read_bytes()[:-100])  # as a machine that lost its power leaves a file
    assert search(old, query).num_scanned == 4
    moments.drop_moments(store.pin())
    assert not [*tmp_path.glob("longvlm-search-*/*")]


def test_no_room_for_the_vectors_is_a_sentence(store, tmp_path, monkeypatch):
    stores.index(store, ["a"])
    (tmp_path / f"longvlm-search-{os.getuid()}").mkdir(mode=0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"this user's alone.* set TMPDIR"):
        search(store.pin(), np.ones(stores.WIDTH))


def test_where_chooses_among_segments_and_their_videos(store):
    made = stores.index(store, ["a", "b"])
    query = vectors(made)[1]
    where = "external_id = 'x-b' AND duration_s > 39 AND start_s >= 10 -- the rest of b"
    snapshot = store.pin()
    result = search(snapshot, query, within=segments_where(snapshot, where))
    assert {hit.uri for hit in result.rows} == {stores.uri_of("b")}
    assert {hit.segment for hit in result.rows} <= {1, 2, 3}
    assert result.num_scanned == 3
    assert search(snapshot, query, within=segments_where(snapshot, "duration_s > 1e6")).rows == []


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
    assert result.num_scanned == 2
    assert result.rows[0].segment == 2


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
        segments_where(store.pin(), where)


def test_a_query_without_direction_is_refused():
    with pytest.raises(InputError, match="zero"):
        search(Snapshot(), np.zeros(4, np.float32))
