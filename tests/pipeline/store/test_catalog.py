import duckdb
import pyarrow as pa
import pytest
import stores

from pipeline.store.catalog import connect, query, write_index_duckdb
from pipeline.store.snapshot import Snapshot
from schemas import tables
from schemas.errors import InputError

LONG, TINY = stores.LONG.fingerprint, stores.TINY.fingerprint


def rows(store, sql: str) -> list[dict]:
    with connect(store.pin()) as con:
        return query(con, sql).to_pylist()


def test_an_empty_store_has_every_view_with_its_columns():
    with connect(Snapshot()) as con:
        for name, schema in tables.TABLES.items():
            found = query(con, f"FROM ledger_{name}").schema
            assert found.names == schema.names
            assert [found.field(f.name).type for f in schema if not pa.types.is_nested(f.type)] == [
                f.type for f in schema if not pa.types.is_nested(f.type)
            ]
        for view in ("videos", "segments", "tokens", "answers", "failures", "recipes", "runs", "live_videos"):
            assert query(con, f"FROM {view}").num_rows == 0


def test_stored_and_empty_relations_have_the_same_types(store):
    stores.index(store, ["a"])
    with connect(Snapshot()) as empty, connect(store.pin()) as full:
        for view in ("videos", "segments", "tokens", "recipes"):
            assert query(empty, f"DESCRIBE {view}").equals(query(full, f"DESCRIBE {view}"))


def test_a_video_is_shown_once_live_or_else_failed(store):
    stores.index(store, ["a", "b"])
    stores.index(store, ["a"])
    made = pa.Table.from_pylist([stores.unit("broken", stores.new_write_id())], tables.ENCODED)
    outcomes = stores.write_shards(store.uri, made, LONG)
    store.commit(outcomes, stores.videos(outcomes, ["broken"], LONG))
    assert rows(store, "SELECT uri, status, external_id, outdated FROM videos ORDER BY uri") == [
        {"uri": "/videos/a.mp4", "status": "indexed", "external_id": "x-a", "outdated": False},
        {"uri": "/videos/b.mp4", "status": "indexed", "external_id": "x-b", "outdated": False},
        {"uri": "/videos/broken.mp4", "status": "failed", "external_id": "x-broken", "outdated": False},
    ]
    assert rows(store, "SELECT external_id, error_code, attempts, is_live FROM failures") == [
        {"external_id": "x-broken", "error_code": "truncated", "attempts": 1, "is_live": False}
    ]
    assert rows(store, "SELECT count(*) AS n, count(DISTINCT write_id) AS w FROM segments") == [{"n": 8, "w": 2}]
    assert rows(store, "SELECT DISTINCT external_id FROM tokens ORDER BY 1") == [
        {"external_id": "x-a"},
        {"external_id": "x-b"},
    ]


@pytest.mark.parametrize(("etag", "outdated"), [("2", True), ("1", False)])
def test_a_newer_content_that_failed_leaves_the_older_version_live_and_outdated(store, etag, outdated):
    made = stores.index(store, ["a"])
    stores.index(store, ["a"], status="failed", error_code="no_frames", etag=etag, write_id=None)
    assert rows(store, "SELECT write_id, status, outdated FROM videos") == [
        {"write_id": made["write_id"][0].as_py(), "status": "indexed", "outdated": outdated}
    ]
    assert rows(store, "SELECT error_code, is_live FROM failures") == [{"error_code": "no_frames", "is_live": True}]
    stores.index(store, ["a"], etag=etag)
    assert rows(store, "SELECT outdated FROM videos") == [{"outdated": False}]
    assert rows(store, "FROM failures") == []


def test_without_an_etag_the_time_of_change_tells_contents_apart(store):
    stores.index(store, ["a", "b"], etag=None, modified_at=1)
    stores.index(store, ["a"], status="failed", etag=None, modified_at=2)
    stores.index(store, ["b"], status="failed", etag=None, modified_at=1)
    assert rows(store, "SELECT outdated FROM videos ORDER BY uri") == [{"outdated": True}, {"outdated": False}]


def test_a_deleted_video_leaves_every_view(store):
    stores.index(store, ["a"])
    stores.index(store, ["a"], stores.TINY)
    stores.index(store, ["b"], status="failed", error_code="no_frames")
    store.append("videos", stores.deleted(["a", "b"]))
    for view in ("videos", "segments", "tokens", "failures", "live_videos", "failed_videos"):
        assert rows(store, f"FROM {view}") == []


def test_promoting_switches_all_views_and_back(store):
    stores.index(store, ["a", "b"])
    stores.index(store, ["a"], stores.TINY)
    assert rows(store, "SELECT count(*) AS n FROM videos") == [{"n": 2}]
    store.promote("tiny")
    for view, count in {"videos": 1, "segments": 4, "tokens": 4}.items():
        assert rows(store, f"SELECT count(*) AS n, any_value(recipe) AS r FROM {view}") == [{"n": count, "r": TINY}]
    assert rows(store, "SELECT recipe, count(*) AS n FROM live_videos GROUP BY ALL ORDER BY n") == [
        {"recipe": TINY, "n": 1},
        {"recipe": LONG, "n": 2},
    ]
    assert rows(store, "SELECT name, active FROM recipes ORDER BY registered_seq") == [
        {"name": "long", "active": False},
        {"name": "tiny", "active": True},
    ]
    store.promote("long")
    assert rows(store, "SELECT count(*) AS n FROM videos") == [{"n": 2}]


def answer(write_id: str, text: str, created_at: int, **columns) -> dict:
    row = {"question_id": "q", "question_hash": "h", "answer_recipe": "r", "run_id": "1", "status": "answered"}
    row |= {"write_id": write_id, "answer": text, "created_at": created_at}
    return {**row, "evidence": [{"start_s": 1.0, "end_s": 2.0, "weight": 0.5}], **columns}


def test_answers_are_the_newest_of_what_is_live_under_any_recipe(store):
    first, second = stores.index(store, ["a", "b"])["write_id"].to_pylist()
    other = stores.index(store, ["a"], stores.TINY)["write_id"][0].as_py()
    made = [
        answer(first, "old", 1),
        answer(first, "new", 2),
        answer(first, "other question", 1, question_id="q2"),
        answer(second, "of b", 1),
        answer(other, "of tiny", 1),
        answer("gone", "of nobody", 9),
    ]
    store.append("answers", pa.Table.from_pylist(made, tables.ANSWERS))
    found = rows(store, "SELECT answer, external_id, recipe FROM answers ORDER BY answer")
    assert [(row["answer"], row["external_id"], row["recipe"]) for row in found] == [
        ("new", "x-a", LONG),
        ("of b", "x-b", LONG),
        ("of tiny", "x-a", TINY),
        ("other question", "x-a", LONG),
    ]
    assert rows(store, "SELECT evidence[1].end_s AS e FROM answers LIMIT 1") == [{"e": 2.0}]
    stores.index(store, ["b"])
    assert rows(store, "FROM answers WHERE external_id = 'x-b'") == []


# --- queries ---


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELECT nope FROM videos", 'Binder Error: Referenced column "nope" not found'),
        ("FROM nowhere", "Catalog Error: Table with name nowhere does not exist!"),
        ("SELEC 1", "Parser Error"),
        ("SELECT 'x'::INT", "Conversion Error"),
        ("SELECT 1; SELECT 2", "one SELECT statement"),
        ("", "one SELECT statement"),
        ("COPY (SELECT 1) TO '/tmp/x.csv'", "one SELECT statement"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '/tmp/x.csv'", "one SELECT statement"),
        ("INSTALL httpfs", "one SELECT statement"),
        ("FROM secret_of_python", "does not exist"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(sql, sentence):
    secret_of_python = pa.table({"x": [1]})
    with connect(Snapshot()) as con, pytest.raises(InputError, match=sentence) as caught:
        query(con, sql)
    assert "\n" not in str(caught.value)
    assert secret_of_python.num_rows == 1


def test_selects_of_every_form_run(store):
    for sql in ("WITH x AS (SELECT 1 AS a) FROM x", "VALUES (1)", "DESCRIBE videos", "SUMMARIZE videos", "SHOW TABLES"):
        assert rows(store, sql)


def test_json_is_there_without_an_extension_being_fetched(store):
    assert rows(store, "SELECT spec->>'$.tower.name' AS tower FROM recipes LIMIT 1") == [{"tower": "made-up"}]


def test_addresses_with_quotes_work(tmp_path):
    store = stores.Store.create(str(tmp_path / "it's mine"))
    store.register_recipe(stores.LONG, "m")
    stores.index(store, ["a"])
    assert len(rows(store, "FROM segments")) == 4


# --- index.duckdb ---


def test_index_duckdb_opens_alone_and_is_replaced_at_once(store, tmp_path):
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


def test_a_remote_store_gets_no_index_duckdb():
    assert write_index_duckdb("s3://bucket/store", Snapshot()) is None
