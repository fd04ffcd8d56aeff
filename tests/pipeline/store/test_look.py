import pyarrow as pa
import stores

from longvlm.pipeline.store.catalog import connect, query
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Look
from longvlm.schemas import tables
from longvlm.schemas.identity import video_id


def look_at(store, **tied):
    with connect(store.pin()) as con:
        ((seq,),) = con.execute("SELECT max(seq) FROM ledger_videos").fetchall()
    return Look(seq, {video_id(stores.uri_of(new)): video_id(stores.uri_of(old)) for new, old in tied.items()})


def live(store):
    with connect(store.pin()) as con:
        return {row["uri"] for row in query(con, "SELECT uri FROM live_videos").to_pylist()}


def moved(store, old, new):
    with connect(store.pin()) as con:
        sql = f"SELECT * EXCLUDE (outdated) FROM live_videos WHERE uri = '{stores.uri_of(old)}'"
        (row,) = query(con, sql).to_pylist()
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
    rows = stores.newest(other)
    shard = write_parquet(other.uri, "videos", rows.select(tables.VIDEOS.names).cast(tables.VIDEOS))
    other.replace_files("videos", pinned.files, [shard])
    assert not store.append("videos", stores.deleted(["a"]), look).num_rows
    assert live(store) == {stores.uri_of("b")}


def test_the_two_sides_of_a_move_stand_or_fall_together(store):
    stores.index(store, ["a", "b"])
    rows, look = moved(store, "a", "new"), look_at(store, new="a")
    stores.index(Store.open(store.uri), ["a"], seed=1, etag="2")
    assert store.append("videos", rows, look).num_rows == 2
    assert live(store) == {stores.uri_of("a"), stores.uri_of("b")}


def test_one_write_is_not_live_twice_though_two_found_that_it_moved(store):
    stores.index(store, ["a"])
    first, second = moved(store, "a", "one"), moved(store, "a", "two")
    looks = look_at(store, one="a"), look_at(store, two="a")
    store.append("videos", first, looks[0])
    assert Store.open(store.uri).append("videos", second, looks[1]).num_rows == 2
    assert live(store) == {stores.uri_of("one")}
