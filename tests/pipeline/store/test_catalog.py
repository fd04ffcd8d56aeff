import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
import stores
from hypothesis import example, given
from hypothesis import strategies as st
from stores import rows

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.catalog import connect, query
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import PinnedTable, Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import column_names, identifier

LONG, TINY = stores.LONG.fingerprint, stores.TINY.fingerprint


def test_an_empty_store_has_every_view_with_its_columns():
    with connect(Snapshot()) as con:
        for name, schema in tables.TABLES.items():
            found = query(con, f"FROM ledger_{name}").schema
            assert found.names == schema.names
            assert [found.field(f.name).type for f in schema if not pa.types.is_nested(f.type)] == [
                f.type for f in schema if not pa.types.is_nested(f.type)
            ]
        for view in (
            "videos",
            "segments",
            "tokens",
            "answers",
            "failures",
            "recipes",
            "runs",
            "live_videos",
            "answers_wide",
        ):
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


def test_a_worker_whose_clock_is_ahead_hides_no_later_answer(store):
    first = stores.index(store, ["a"])["write_id"][0].as_py()
    day_us = 86_400_000_000
    add_answers(store, answer(first, "failed", day_us, status="failed", type="bool"))
    add_answers(store, answer(first, "Yes", 5, value="true", type="bool"))
    assert rows(store, "SELECT answer FROM answers") == [{"answer": "Yes"}]
    assert rows(store, "SELECT q FROM answers_wide") == [{"q": True}]


def test_an_answer_that_is_not_of_its_type_is_shown_with_its_text(store):
    first = stores.index(store, ["a"])["write_id"][0].as_py()
    add_answers(store, answer(first, "3", 1, type="number"), answer(first, "many", 2, type="number", status="unparsed"))
    assert rows(store, "SELECT answer, status, value FROM answers") == [
        {"answer": "many", "status": "unparsed", "value": None}
    ]


def test_two_models_stand_side_by_side(store):
    first = stores.index(store, ["a"])["write_id"][0].as_py()
    of = {model: {"model": model, "answer_recipe": f"of {model}", "type": "bool"} for model in "AB"}
    made = [answer(first, "Yes", 1, value="true", **of["A"]), answer(first, "No", 1, value="false", **of["B"])]
    made += [answer(first, "No", 2, value="false", question_id="q2", **of[model]) for model in "AB"]
    add_answers(store, *made, answer(first, "Yes", 3, question_id="q3", **of["A"]))
    comparison = """
        SELECT a.question_id, a.answer AS of_a, b.answer AS of_b,
            coalesce(a.value, a.answer) = coalesce(b.value, b.answer) AS agree
        FROM answers a JOIN answers b USING (write_id, question_id, question_hash)
        WHERE a.model = 'A' AND b.model = 'B' ORDER BY 1
    """
    assert rows(store, comparison) == [
        {"question_id": "q", "of_a": "Yes", "of_b": "No", "agree": False},
        {"question_id": "q2", "of_a": "No", "of_b": "No", "agree": True},
    ]


# --- answers_wide ---


FIXED = ["video_id", "uri", "external_id", "write_id"]


def add_answers(store, *made) -> None:
    of = {row["write_id"]: row["video_id"] for row in rows(store, "SELECT write_id, video_id FROM live_videos")}
    made = [{"video_id": of.get(row["write_id"]), **row} for row in made]
    store.append("answers", pa.Table.from_pylist(made, tables.ANSWERS))


def wide(store) -> pa.Table:
    with connect(store.pin()) as con:
        return query(con, "FROM answers_wide ORDER BY uri")


def test_without_answers_the_wide_view_has_a_row_a_live_video(store):
    stores.index(store, ["a", "b"])
    store.append("videos", stores.deleted(["b"]))
    assert wide(store).column_names == FIXED
    assert wide(store)["external_id"].to_pylist() == ["x-a"]


def test_each_question_is_a_column_of_its_type(store):
    first, _ = stores.index(store, ["a", "b"])["write_id"].to_pylist()
    typed = {"choice": "red", "bool": "true", "number": "1234.5", "json": '{"a": [1]}'}
    made = [
        answer(first, "words", i, question_id=f"of {kind}", type=kind, value=value)
        for i, (kind, value) in enumerate(typed.items())
    ]
    add_answers(store, *made, answer(first, "words", 9, question_id="of text", type="text", value=None))
    found = wide(store)
    assert found.column_names == [*FIXED, "of choice", "of bool", "of number", "of json", "of text"]
    assert found.drop_columns(FIXED).to_pylist() == [
        {"of choice": "red", "of bool": True, "of number": 1234.5, "of json": '{"a": [1]}', "of text": "words"},
        dict.fromkeys(found.column_names[4:]),
    ]
    types = {row["column_name"]: row["column_type"] for row in rows(store, "DESCRIBE answers_wide")}
    assert list(types.values())[4:] == ["VARCHAR", "BOOLEAN", "DOUBLE", "JSON", "VARCHAR"]
    assert rows(store, """SELECT "of json"->'$.a[0]' AS a FROM answers_wide WHERE "of bool" """) == [{"a": "1"}]


def test_the_newest_answer_of_any_model_counts_and_what_failed_does_not(store):
    first, second = stores.index(store, ["a", "b"])["write_id"].to_pylist()
    add_answers(
        store,
        answer(first, "old", 1),
        answer(first, "new", 2, answer_recipe="of another model"),
        answer(first, "reworded, and lost", 3, question_hash="h2", status="failed"),
        answer(second, "not of its type", 1, status="unparsed"),
        answer("gone", "of nobody", 9, question_id="of nobody"),
    )
    found = wide(store)
    assert found["q"].to_pylist() == ["new", None]
    assert found["of nobody"].null_count == 2  # its column stays while its video is indexed anew


def test_a_question_that_changed_its_type_has_the_values_of_the_newest(store):
    first, second = stores.index(store, ["a", "b"])["write_id"].to_pylist()
    add_answers(
        store,
        answer(first, "1", 1, type="number", value="1"),
        answer(second, "1", 1, type="number", value="1"),
        answer(second, "Yes", 2, type="bool", value="true", question_hash="h2"),
    )
    assert wide(store)["q"].to_pylist() == [None, True]


def test_a_video_live_under_two_recipes_is_one_row_with_the_answers_of_both(store):
    of_long = stores.index(store, ["a"])["write_id"][0].as_py()
    of_tiny = stores.index(store, ["a"], stores.TINY)["write_id"][0].as_py()
    add_answers(store, answer(of_long, "long", 1), answer(of_tiny, "tiny", 2, question_id="q2"))
    assert wide(store).select(["write_id", "q", "q2"]).to_pylist() == [{"write_id": of_long, "q": "long", "q2": "tiny"}]
    store.promote("tiny")
    assert wide(store)["write_id"].to_pylist() == [of_tiny]


def test_columns_are_those_of_the_questions_with_most_answers(store, monkeypatch):
    monkeypatch.setattr(catalog, "MAX_WIDE_COLUMNS", 2)
    first, second = stores.index(store, ["a", "b"])["write_id"].to_pylist()
    asked = [("rare", first), ("standing", first), ("also", first), ("standing", second), ("also", second)]
    add_answers(store, *(answer(of, "x", i, question_id=name) for i, (name, of) in enumerate(asked)))
    assert wide(store).column_names == [*FIXED, "standing", "also"]


@pytest.fixture(scope="module")
def database():
    with duckdb.connect() as con:
        yield con


@given(ids=st.lists(st.text(max_size=4), unique=True))
@example(ids=["a", "A", "a_2", "video_id", "URI", "", "question", '"', "'", "\0", "ß", "SS", "é", "É", "\U0010ffff"])
def test_every_id_has_a_column_of_its_own(database, ids):
    names = column_names(ids)
    columns = ", ".join(f"{i} AS {identifier(name)}" for i, name in enumerate([*FIXED, *names]))
    database.execute(f"CREATE OR REPLACE VIEW v AS SELECT {columns}")
    assert database.sql("FROM v").columns == [*FIXED, *names]
    assert all(name.startswith(given.replace("\0", "")) for name, given in zip(names, ids, strict=True))


def test_ids_of_any_spelling_keep_their_answers_apart(store):
    first = stores.index(store, ["a"])["write_id"][0].as_py()
    ids = ["q", "Q", "video_id", "it's", 'say "hi"', "", "a b", "x; DROP TABLE v", "bool\x1fq", "ü", "{}", "q_2", "\0"]
    add_answers(store, *(answer(first, f"of {i}", 1000 + i, question_id=name) for i, name in enumerate(ids)))
    found = wide(store)
    assert found.column_names[4:] == column_names(ids)
    assert [found[name][0].as_py() for name in column_names(ids)] == [f"of {i}" for i in range(len(ids))]


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
def test_what_cannot_be_run_is_told_in_duckdbs_words(sql, sentence):
    secret_of_python = pa.table({"x": [1]})
    with connect(Snapshot()) as con, pytest.raises(InputError, match=sentence) as caught:
        query(con, sql)
    assert str(caught.value).startswith("the query ")
    assert secret_of_python.num_rows == 1


def test_selects_of_every_form_run(store):
    forms = ("WITH x AS (SELECT 1 AS a) FROM x", "VALUES (1)", "DESCRIBE videos", "SUMMARIZE videos", "SHOW TABLES")
    with connect(store.pin()) as con:
        assert [sql for sql in forms if not query(con, sql).num_rows] == []


def test_json_is_there_without_an_extension_being_fetched(store):
    assert rows(store, "SELECT spec->>'$.tower.name' AS tower FROM recipes LIMIT 1") == [{"tower": "made-up"}]


def test_addresses_with_quotes_work(tmp_path):
    store = stores.Store.create(str(tmp_path / "it's mine"))
    store.register_recipe(stores.LONG, "m")
    stores.index(store, ["a"])
    assert len(rows(store, "FROM segments")) == 4


def test_a_file_that_is_gone_is_a_sentence(store, tmp_path):
    stores.index(store, ["a"])
    snapshot = store.pin()
    next((tmp_path / "store" / "segments").glob("*.parquet")).unlink()
    with pytest.raises(InputError, match="gone or damaged"):
        connect(snapshot)


@pytest.mark.parametrize(
    ("pinned", "shown"),
    [
        (["recipes"], {"active_recipe", "recipes"}),
        (["videos"], {"deletions", "newest_rows", "live_videos", "failed_videos"}),
        (["verdicts"], set()),  # whose videos nobody pinned
        (["videos", "answers"], {"deletions", "newest_rows", "live_videos", "failed_videos", "answers"}),
    ],
)
def test_a_connection_has_the_views_of_the_tables_that_it_is_given(pinned, shown):
    """A view over a table that was not pinned would show a store without its rows."""
    with connect(Snapshot({name: PinnedTable() for name in pinned}), apart=True) as con:
        found = con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    assert {name for (name,) in found} == shown | {f"ledger_{name}" for name in pinned}


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ((), set()),
        (("live_videos",), {"deletions", "live_videos"}),
        (("recipes", "newest_rows"), {"active_recipe", "recipes", "deletions", "newest_rows"}),
    ],
)
def test_a_connection_has_the_views_that_are_asked_for_and_what_they_stand_on(store, asked, shown):
    snapshot = store.pin()
    with connect(snapshot, asked, apart=True) as con:
        found = con.execute("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        assert con.execute("SELECT content_of(1, 'a', NULL)").fetchall() == [((1, "a"),)]
    assert {name for (name,) in found} == shown | {f"ledger_{name}" for name in snapshot.tables}


@pytest.mark.parametrize(
    "sql", ["FROM live_videos", "SELECT count(*) FROM answers", "FROM ledger_answers", "FROM videos"]
)
def test_in_the_database_of_all_connections_a_table_that_was_not_given_is_not_an_empty_one(store, sql):
    stores.index(store, ["a"])
    given = ["videos", "recipes"] if "answers" in sql else ["recipes", "answers"]
    with connect(store.pin(given)) as con, pytest.raises(duckdb.Error, match="is not part of what this connection was"):
        con.execute(sql).fetchall()


def test_connections_share_a_database_and_see_nothing_of_each_other(store):
    stores.index(store, ["a"])
    with (
        connect(store.pin(), ()) as one,
        connect(Snapshot(), ()) as other,
        connect(Snapshot(), (), apart=True) as apart,
    ):
        one.execute("CREATE TEMP TABLE made AS FROM ledger_videos")
        counts = [con.execute("SELECT count(*) FROM ledger_videos").fetchall() for con in (one, other, apart)]
        shown = [con.execute("SELECT count(*) FROM duckdb_tables()").fetchall() for con in (one, other, apart)]
        apart.execute("SET enable_external_access = false")
        assert query(one, "FROM ledger_videos").num_rows == 1
    assert counts == [[(1,)], [(0,)], [(0,)]]
    assert shown == [[(1,)], [(0,)], [(0,)]]


@pytest.mark.parametrize("trusts_footers", [True, False])
def test_a_database_that_broke_is_followed_by_another(store, trusts_footers):
    stores.index(store, ["a"])
    catalog._database(os.getpid(), trusts_footers=trusts_footers).close()
    with catalog.connect(store.pin(), ("videos",), trusts_footers=trusts_footers) as con:
        assert con.execute("SELECT uri FROM videos").fetchall() == [("/videos/a.mp4",)]


def test_rows_of_a_file_that_is_another_now_are_not_remembered(store):
    stores.index(store, ["a"])
    (path,) = Path(store.uri, "videos").glob("*.parquet")
    assert rows(store, "SELECT uri FROM videos") == [{"uri": "/videos/a.mp4"}]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="gone or damaged"):
        rows(store, "SELECT uri FROM videos")


def test_recipes_are_read_once_until_there_are_others(store, monkeypatch):
    known = store.recipes()
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "connect", None)
        assert Store.open(store.uri).recipes() == known
    store.promote("tiny")
    assert [recipe.active for recipe in store.recipes()] == [not recipe.active for recipe in known]
