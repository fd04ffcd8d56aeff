import pyarrow.parquet as pq
import pytest
import stores
from deltalake.exceptions import CommitFailedError

from pipeline.store.catalog import connect, query
from pipeline.store.files import write_parquet
from pipeline.store.ledger import Store
from pipeline.store.upkeep import merge_small_files

LIVE = "SELECT uri, segment, start_s, embedding, external_id FROM segments ORDER BY uri, segment"


def test_merging_keeps_every_row_and_the_readers_that_were_there_before(store):
    for number in range(9):
        stores.index(store, [f"v{number}"], seed=number)
    before = store.pin()
    rows = query(connect(before), LIVE)
    assert merge_small_files(store) == {"videos": 8, "segments": 8, "answers": 0}
    after = store.pin()
    assert {name: len(table.files) for name, table in after.tables.items()} | {"recipes": 0} == {
        "videos": 1, "segments": 1, "tokens": 9, "answers": 0, "recipes": 0, "runs": 0,
    }  # fmt: skip
    assert query(connect(after), LIVE).equals(rows)
    assert query(connect(before), LIVE).equals(rows)
    assert stores.newest(Store.open(store.uri)).num_rows == 9
    assert merge_small_files(store) == {"videos": 0, "segments": 0, "answers": 0}


def test_two_mergers_of_the_same_files_do_not_double_them(store):
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    pinned = store.pin().table("segments")
    rows = pq.ParquetDataset([file.uri for file in pinned.files]).read()
    first, second = (write_parquet(store.uri, "segments", rows) for _ in range(2))
    store.replace_files("segments", pinned.version, pinned.files, first)
    with pytest.raises(CommitFailedError):
        store.replace_files("segments", pinned.version, pinned.files, second)
    assert query(connect(store.pin()), "SELECT count(*) AS n FROM ledger_segments").to_pylist() == [{"n": 12}]


def test_a_writer_whose_handle_is_older_than_a_merge_loses_and_doubles_nothing(store):
    other = Store.open(store.uri)
    made = stores.encoded(["mine"])
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["mine"], stores.LONG.fingerprint))
    for number in range(8):
        stores.index(other, [f"v{number}"], seed=number)
    merge_small_files(other)
    store.commit(outcomes, stores.videos(outcomes, ["mine"], stores.LONG.fingerprint))  # names its shards once more
    con = connect(store.pin())
    assert query(con, "SELECT count(*) AS n FROM videos").to_pylist() == [{"n": 9}]
    assert query(con, "SELECT count(*) AS n FROM segments").to_pylist() == [{"n": 36}]
