import pyarrow as pa
import stores

from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.upkeep import dead
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.schemas import tables
from longvlm.schemas.identity import video_id


def of(encoded):
    return set(encoded["write_id"].to_pylist())


def test_superseded_deleted_and_abandoned_writes_die_after_the_retention(store):
    superseded = stores.index(store, ["again"])
    live = stores.index(store, ["again", "stays"])
    deleted = stores.index(store, ["gone"])
    store.append("videos", stores.deleted(["gone"]))
    abandoned = stores.encoded(["cut off"])
    store.commit(write_shards(store.uri, abandoned, "r"), tables.VIDEOS.empty_table())
    other_recipe = stores.index(store, ["again"], under=stores.TINY)
    assert dead_writes(store, 48).write_ids.to_pylist() == []
    found = dead_writes(store, 0).write_ids.to_pylist()
    assert found == sorted(found)
    assert set(found) == of(superseded) | of(deleted) | of(abandoned)
    assert not set(found) & (of(live) | of(other_recipe))


def test_a_write_that_moved_along_lives_and_dies_with_its_last_video(store):
    write = of(stores.index(store, ["old"]))
    (write_id,) = write
    moved = {"recipe": stores.LONG.fingerprint, "status": "indexed", "write_id": write_id}
    rows = [
        {**moved, "video_id": video_id(stores.uri_of("new"))},
        {"video_id": video_id(stores.uri_of("old")), "status": "deleted"},
    ]
    store.append("videos", pa.Table.from_pylist(rows, tables.VIDEOS))
    assert dead_writes(store, 0).write_ids.to_pylist() == []
    store.append("videos", stores.deleted(["new"]))
    assert set(dead_writes(store, 0).write_ids.to_pylist()) == write


def test_writes_of_forgotten_videos_are_dead_at_once(store):
    write = of(stores.index(store, ["secret"]))
    row = {"video_id": video_id(stores.uri_of("secret")), "status": "deleted", "error_code": "forgotten"}
    store.append("videos", pa.Table.from_pylist([row], tables.VIDEOS))
    assert set(dead_writes(store, 48).write_ids.to_pylist()) == write


def test_old_shards_are_not_looked_through_again(store, monkeypatch):
    store.commit(write_shards(store.uri, stores.encoded(["cut off"]), "r"), tables.VIDEOS.empty_table())
    monkeypatch.setattr(dead, "_LOOK_BACK_S", -86_400)
    assert dead_writes(store, 0).write_ids.to_pylist() == []
