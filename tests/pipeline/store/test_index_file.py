"""`index.duckdb`, opened as other tools open it."""

import duckdb
import pyarrow as pa
import pytest
import stores

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


def opened(path):
    return duckdb.connect(str(path), read_only=True, config={"autoinstall_known_extensions": "false"})


def test_it_opens_alone_and_is_replaced_at_once(store, tmp_path):
    stores.index(store, ["a"])
    path = write_index_duckdb(store.uri, store.pin())
    assert path == tmp_path / "store" / "index.duckdb"
    with duckdb.connect(str(path), read_only=True) as before:
        stores.index(store, ["b"])
        write_index_duckdb(store.uri, store.pin())
        assert before.execute("SELECT count(*) FROM segments").fetchone() == (4,)
    with duckdb.connect(str(path), read_only=True) as after:
        assert after.execute("SELECT count(*) FROM segments").fetchone() == (8,)
        assert after.execute("SELECT external_id FROM videos ORDER BY 1").fetchall() == [("x-a",), ("x-b",)]
        tags = after.execute("SELECT tags FROM duckdb_databases() WHERE path IS NOT NULL").fetchall()
        assert "v1.0.0" in str(tags)
    assert not list(path.parent.glob(".index-*"))


def test_it_has_every_view_of_a_connection_as_that_has_it(store):
    stores.index(store, ["a"])
    named = "SELECT view_name FROM duckdb_views() WHERE NOT internal ORDER BY 1"
    with opened(write_index_duckdb(store.uri, store.pin())) as con, catalog.connect(store.pin(), apart=True) as live:
        assert con.execute(named).fetchall() == live.execute(named).fetchall()
        for (view,) in con.execute(named).fetchall():
            assert con.execute(f"DESCRIBE {view}").fetchall() == live.execute(f"DESCRIBE {view}").fetchall()
            assert (
                con.execute(f"SELECT count(*) FROM {view}").fetchall() == live.sql(f"FROM {view}").count("*").fetchall()
            )


def test_it_holds_the_wide_view_of_the_answers_that_there_were(store):
    of = stores.index(store, ["a"]).select(["video_id", "write_id"]).to_pylist()[0]

    def add(*question_ids):
        row = {**of, "question_hash": "h", "answer_recipe": "r", "run_id": "1", "status": "answered", "created_at": 1}
        row |= {"answer": "x", "type": "json", "value": '{"a":1}'}
        made = [{**row, "question_id": question_id} for question_id in question_ids]
        store.append("answers", pa.Table.from_pylist(made, tables.ANSWERS))

    add(*(f"it's {i}" for i in range(30)))
    path = write_index_duckdb(store.uri, store.pin())
    add("later")
    with opened(path) as con:
        assert con.execute("SELECT \"it's 29\"->>'$.a', * FROM answers_wide").fetchone()[0] == "1"
        assert len(con.sql("FROM answers_wide").columns) == 34
        assert con.execute("SELECT count(*) FROM answers_wide WHERE uri LIKE '%a.mp4'").fetchone() == (1,)


def test_a_remote_store_gets_none():
    assert write_index_duckdb("s3://bucket/store", Snapshot()) is None


def test_a_file_that_is_gone_is_a_sentence_and_the_file_before_stays(store, tmp_path):
    stores.index(store, ["a"])
    before = write_index_duckdb(store.uri, store.pin()).read_bytes()
    next((tmp_path / "store" / "segments").glob("*.parquet")).unlink()
    with pytest.raises(InputError, match="gone or damaged"):
        write_index_duckdb(store.uri, store.pin())
    assert (tmp_path / "store" / "index.duckdb").read_bytes() == before
    assert not list((tmp_path / "store").glob(".index-*"))
