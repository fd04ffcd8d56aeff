"""The whole room on S3's protocol: a moto server on the loopback, reached by deltalake, s3fs and DuckDB alike."""

from collections import Counter

import numpy as np
import pytest
import stores
from moto.moto_server.werkzeug_app import MotoRequestHandler

from longvlm.pipeline.store.catalog import _remote_filesystem, connect, query
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import search
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas.errors import InputError

pytestmark = pytest.mark.usefixtures("s3")
BUCKET = "s3://bucket"


def test_a_store_in_a_bucket_is_made_filled_read_and_searched():
    store = Store.create(f"{BUCKET}/deep/store/")
    Store.create(store.uri)
    store.register_recipe(stores.LONG, "some/model")
    made = stores.index(store, ["a", "b"])
    other = Store.open(store.uri)
    stores.index(other, ["c"], seed=1)
    stores.index(store, ["d"], seed=2)

    snapshot = Store.open(store.uri).pin()
    assert all(file.uri.startswith(f"{store.uri}/tokens/") for file in snapshot.table("tokens").files)
    read = read_tokens(snapshot, made["write_id"].to_pylist())
    assert read["local"].to_pylist() == [part["local"] for row in made["segments"].to_pylist() for part in row]
    with connect(snapshot) as con:
        assert query(con, "SELECT count(*) AS n FROM segments").to_pylist() == [{"n": 16}]
        assert query(con, "SELECT external_id FROM videos ORDER BY 1")["external_id"].to_pylist() == [
            "x-a", "x-b", "x-c", "x-d",
        ]  # fmt: skip
    wanted = made["segments"][1].as_py()[2]
    hit = search(snapshot, np.array(wanted["embedding"]), limit=1).rows[0]
    assert (hit.uri, hit.segment) == (stores.uri_of("b"), 2)
    assert stores.newest(other).num_rows == 4


def test_connections_share_a_client_and_each_reads_what_its_snapshot_names():
    store = Store.create(f"{BUCKET}/store")
    store.register_recipe(stores.LONG, "some/model")
    counts = "SELECT count(*) AS videos, (SELECT count(*) FROM tokens) AS tokens FROM videos"
    stores.index(store, ["a"])
    before = store.pin()
    with connect(before) as early:
        stores.index(store, ["b"], seed=1)
        after = store.pin()
        with connect(after) as late:
            assert query(late, counts).to_pylist() == [{"videos": 2, "tokens": 8}]
            assert query(early, counts).to_pylist() == [{"videos": 1, "tokens": 4}]
    assert _remote_filesystem(before) is _remote_filesystem(after)


def test_a_file_is_asked_for_once_however_many_views_stand_on_it(monkeypatch):
    store = Store.create(f"{BUCKET}/store")
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["a"])
    asked, make_environ = Counter(), MotoRequestHandler.make_environ

    def counted(handler):
        asked[handler.path] += handler.command == "GET" and ".parquet" in handler.path
        return make_environ(handler)

    monkeypatch.setattr(MotoRequestHandler, "make_environ", counted)
    with connect(store.pin()) as con:
        assert query(con, "FROM videos JOIN segments USING (write_id)").num_rows == 4
    assert max(asked.values()) == 1


@pytest.mark.usefixtures("few_are_merged")
def test_small_files_in_a_bucket_are_merged():
    store = Store.create(f"{BUCKET}/store")
    store.register_recipe(stores.LONG, "some/model")
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    assert merge_small_files(store) == {"videos": 2, "segments": 2, "answers": 0, "verdicts": 0}
    assert stores.newest(store).num_rows == 3


def test_a_bucket_that_is_not_there_is_told_in_a_sentence():
    with pytest.raises(InputError, match=r"the store s3://nowhere/store cannot be read: .*bucket does not exist"):
        Store.open("s3://nowhere/store")
    with pytest.raises(InputError, match="cannot be written"):
        Store.create("s3://nowhere/store")
    with pytest.raises(InputError, match="there is no store at"):
        Store.open(f"{BUCKET}/empty")
