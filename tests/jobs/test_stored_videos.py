from pathlib import Path

import pyarrow as pa
import pytest
import stores

from longvlm.jobs.stored_videos import VIDEOS_PER_READ, read_videos, stream_videos
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.identity import new_write_id


@pytest.fixture
def store(tmp_path):
    return Store.create(str(tmp_path / "store"))


def commit(store, *made):
    for units in made:
        store.commit(write_shards(store.uri, units, "recipe"), tables.VIDEOS.empty_table())
    return [write_id for units in made for write_id in units["write_id"].to_pylist()]


def test_videos_come_in_the_order_they_are_asked_for_and_as_often(store):
    first, second = commit(store, stores.encoded(["a"]), stores.encoded(["b"], num_segments=2, seed=1))
    asked = [second, first, second]
    found = read_videos(store.pin(), asked)
    for write_id, video in zip(asked, found, strict=True):
        stored = from_arrow(read_tokens(store.pin(), [write_id]))
        assert video.tokens.local.equal(stored.local)
        assert [part["start_s"] for part in video.segments] == [10.0 * i for i in range(len(stored.counts))]
        assert video.vectors is None
    (video,) = read_videos(store.pin(), [first], with_embedding=True)
    assert video.vectors.counts == (1,) * 4
    assert read_videos(store.pin(), []) == []


def test_a_broken_shard_fails_only_the_videos_that_it_holds(store):
    kept, lost = commit(store, stores.encoded(["a"]), stores.encoded(["b"]))
    snapshot = store.pin()
    Path(snapshot.files_for("tokens", [lost])[0].uri).unlink()
    unknown = new_write_id()
    good, gone, missing = read_videos(snapshot, [kept, lost, unknown])
    assert len(good.segments) == 4
    assert (gone.code, missing.code) == (ErrorCode.NOT_FOUND, ErrorCode.BAD_TOKENS)
    assert "index the video again" in missing.message


def test_segments_that_are_not_those_of_the_tokens_are_told(store, monkeypatch):
    (write_id,) = commit(store, stores.encoded(["a"]))
    monkeypatch.setattr("longvlm.jobs.stored_videos.read_segments", lambda *_, **__: pa.table({"write_id": []}))
    (video,) = read_videos(store.pin(), [write_id])
    assert (video.code, video.message[:32]) == (ErrorCode.BAD_TOKENS, "the video's segments and tokens ")


def test_a_network_that_fails_is_told_for_every_video(store, monkeypatch):
    write_ids = commit(store, stores.encoded(["a", "b"]))

    def read(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr("longvlm.jobs.stored_videos.read_tokens", read)
    for asked in (write_ids, [write_ids[0]] * 2):
        found = read_videos(store.pin(), asked)
        assert [video.code for video in found] == [ErrorCode.NETWORK] * 2
        assert "no route" in found[0].message


def test_a_stream_is_read_a_few_videos_at_a_time_ahead_of_its_use(store, monkeypatch):
    names = [f"{i:02}" for i in range(4 * VIDEOS_PER_READ + 1)]
    write_ids = commit(store, stores.encoded(names, num_segments=1))
    reads = []

    def read(snapshot, some):
        reads.append(len(some))
        return read_tokens(snapshot, some)

    monkeypatch.setattr("longvlm.jobs.stored_videos.read_tokens", read)
    stream = stream_videos(store.pin(), write_ids)
    first = next(stream)
    assert len(reads) <= 2
    found = [first, *stream]
    assert reads == [VIDEOS_PER_READ] * 4 + [1]
    alone = [video for write_id in write_ids for video in read_videos(store.pin(), [write_id])]
    assert all(one.tokens.local.equal(other.tokens.local) for one, other in zip(found, alone, strict=True))
