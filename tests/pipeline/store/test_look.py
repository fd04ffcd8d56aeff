import pyarrow as pa
import stores
from stores import rows

from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Look
from longvlm.schemas import tables
from longvlm.schemas.identity import video_id


def look_at(store, **tied):
    (ledger,) = rows(store, "SELECT max(seq) AS seq FROM ledger_videos")
    return Look(
        ledger["seq"], {video_id(stores.uri_of(new)): video_id(stores.uri_of(old)) for new, old in tied.items()}
    )


def live(store):
    return {row["uri"] for row in rows(store, "SELECT uri FROM live_videos")}


def moved(store, old, new):
    (row,) = rows(store, f"SELECT * EXCLUDE (outdated) FROM live_videos WHERE uri = '{stores.uri_of(old)}'")
    row |= {"video_id": video_id(stores.uri_of(new)), "uri": stores.uri_of(new)}
    return pa.concat_tables([pa.Table.from_pylist([row], tables.VIDEOS), stores.deleted([old])])


def test_a_deletion_by_an_old_look_does_not_take_what_was_indexed_since(store):
    stores.index(store, ["a", "b"])
    look = look_at(store)
    stores.index(Store.open(store.uri), ["a"], seed=1)
    left_out = store.append("videos", stores.deleted(["a", "b"]), look)
    assert left_out["video_id"].to_pylist() == [video_id(stores.uri_of("a"))]
    assert live(store) == {stores.uri_of("a")}


def test_a_look_holds_though_files_were_merged_since(store):
    stores.index(store, ["a", "b"])
    look = look_at(store)
    other = Store.open(store.uri)
    pinned = other.pin().table("videos")
    newest = stores.newest(other)
    shard = write_parquet(other.uri, "videos", newest.select(tables.VIDEOS.names).cast(tables.VIDEOS))
    other.replace_files("videos", pinned.files, [shard])
    assert not store.append("videos", stores.deleted(["a"]), look).num_rows
    assert live(store) == {stores.uri_of("b")}


def test_the_two_sides_of_a_move_stand_or_fall_together(store):
    stores.index(store, ["a", "b"])
    both, look = moved(store, "a", "new"), look_at(store, new="a")
    stores.index(Store.open(store.uri), ["a"], seed=1, etag="2")
    assert store.append("videos", both, look).num_rows == 2
    assert live(store) == {stores.uri_of("a"), stores.uri_of("b")}


def test_one_write_is_not_live_twice_though_two_found_that_it_moved(store):
    stores.index(store, ["a"])
    first, second = moved(store, "a", "one"), moved(store, "a", "two")
    looks = look_at(store, one="a"), look_at(store, two="a")
    store.append("videos", first, looks[0])
    assert Store.open(store.uri).append("videos", second, looks[1]).num_rows == 2
    assert live(store) == {stores.uri_of("one")}
