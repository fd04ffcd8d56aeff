import json
import shutil

import duckdb
import pyarrow as pa
import pytest
import stores
from click.testing import CliRunner

from longvlm.jobs.cli import main
from longvlm.jobs.query.export import export_store
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Where a store lies of two live videos with answers of every type, one that failed, one run."""
    made = Store.create(str(tmp_path_factory.mktemp("filled") / "it's a store"))
    made.register_recipe(stores.LONG, "some/model")
    first, second = stores.index(made, ["a", "b"])["write_id"].to_pylist()
    stores.index(made, ["broken"], status="failed", error_code="no_frames", write_id=None)
    plain = {"question_hash": "h", "answer_recipe": "r", "run_id": "1", "status": "answered", "created_at": 1}
    typed = {"is it?": ("bool", "true"), "how many": ("number", "2.5"), "as json": ("json", '{"a": [1]}')}
    rows = [
        {"write_id": of, "question_id": name, "type": kind, "value": value, "answer": "words", **plain}
        for of in (first, second)
        for name, (kind, value) in typed.items()
    ]
    evidence = [{"start_s": 1.0, "end_s": 2.0, "weight": 0.5}]
    live = dict(zip((first, second), ("a", "b"), strict=True))
    rows = [
        {**row, "video_id": stores.video_id(stores.uri_of(live[row["write_id"]])), "evidence": evidence} for row in rows
    ]
    made.append("answers", pa.Table.from_pylist(rows, tables.ANSWERS))
    made.append(
        "runs", pa.Table.from_pylist([{"run_id": "1", "job": "index", "counts": "{}", "wall_s": 1.0}], tables.RUNS)
    )
    return made.uri


@pytest.fixture
def store(tmp_path, filled):
    """A copy of it."""
    return Store.open(str(shutil.copytree(filled, tmp_path / "it's a store")))


def test_the_file_holds_what_the_views_show_and_needs_nothing_else(store, tmp_path):
    report = export_store(store.uri, str(tmp_path / "out.duckdb"))
    with catalog.connect(store.pin()) as con:
        shown = {name: con.sql(f"FROM {name}").to_arrow_table() for name in report.rows}
    (tmp_path / "it's a store").rename(tmp_path / "gone")
    settings = {"enable_external_access": "false"}
    with duckdb.connect(str(tmp_path / "out.duckdb"), read_only=True, config=settings) as con:
        names = con.execute("SELECT table_name FROM duckdb_tables() ORDER BY ALL").fetchall()
        assert [name for (name,) in names] == sorted(report.rows)
        assert con.execute("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]
        for name, expected in shown.items():
            found = con.sql(f"FROM {name}").to_arrow_table()
            assert found.schema == expected.schema
            assert sorted(map(repr, found.to_pylist())) == sorted(map(repr, expected.to_pylist()))
        assert con.execute("""SELECT "is it?", "how many", "as json"->>'$.a[0]' FROM answers_wide""").fetchall() == [
            (True, 2.5, "1"),
            (True, 2.5, "1"),
        ]
        assert "v1.0.0" in str(con.execute("SELECT tags FROM duckdb_databases() WHERE path IS NOT NULL").fetchall())
    judged = {"verdicts": 0, "scores": 0}
    asked = {"answers": 6, "answers_wide": 2, **judged}
    assert report.rows == {"videos": 3, **asked, "failures": 1, "runs": 1, "recipes": 1}
    assert report.size_bytes == (tmp_path / "out.duckdb").stat().st_size


def test_segments_come_with_embeddings_of_fixed_width(store, tmp_path):
    report = export_store(store.uri, str(tmp_path / "out.duckdb"), segments=True)
    assert report.rows["segments"] == 8
    with duckdb.connect(str(tmp_path / "out.duckdb"), read_only=True) as con:
        assert con.execute("SELECT DISTINCT typeof(embedding) FROM segments").fetchall() == [
            (f"FLOAT[{stores.WIDTH}]",)
        ]
        best = "SELECT max(array_cosine_similarity(embedding, embedding)) FROM segments"
        assert con.execute(best).fetchone()[0] == pytest.approx(1)


def test_a_store_without_embeddings_or_anything_is_exported_too(tmp_path):
    empty = Store.create(str(tmp_path / "store"))
    assert set(export_store(empty.uri, str(tmp_path / "empty.duckdb"), segments=True).rows.values()) == {0}
    empty.register_recipe(stores.LONG, "some/model")
    made = stores.encoded(["a"], embedded=False)
    outcomes = stores.write_shards(empty.uri, made, stores.LONG.fingerprint)
    empty.commit(outcomes, stores.videos(outcomes, ["a"], stores.LONG.fingerprint))
    assert export_store(empty.uri, str(tmp_path / "bare.duckdb"), segments=True).rows["segments"] == 4


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("there.duckdb", "is there already.*--force"),
        ("out.parquet", r"must end in \.duckdb"),
        ("nowhere/out.duckdb", "no folder .*make it first"),
        ("it's a store/out.duckdb", "lies in the store"),
        ("folder.duckdb", "is there already"),
        ("s3://bucket/out.duckdb", "not on this machine"),
    ],
)
def test_where_it_cannot_go_nothing_is_written(store, tmp_path, target, sentence):
    (tmp_path / "there.duckdb").write_text("mine")
    (tmp_path / "folder.duckdb").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=sentence):
        export_store(store.uri, target if "://" in target else str(tmp_path / target))
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.duckdb").read_text() == "mine"


def test_with_force_a_file_is_replaced_at_once(store, tmp_path):
    target = tmp_path / "out.duckdb"
    export_store(store.uri, str(target))
    with duckdb.connect(str(target), read_only=True) as before:
        stores.index(store, ["c"])
        export_store(store.uri, str(target), force=True)
        assert before.execute("SELECT count(*) FROM videos").fetchone() == (3,)
    with duckdb.connect(str(target), read_only=True) as after:
        assert after.execute("SELECT count(*) FROM videos").fetchone() == (4,)
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_is_gone_leaves_the_old_file(store, tmp_path):
    target = tmp_path / "out.duckdb"
    export_store(store.uri, str(target))
    before = target.read_bytes()
    next((tmp_path / "it's a store" / "videos").glob("*.parquet")).unlink()
    with pytest.raises(InputError, match="gone or damaged"):
        export_store(store.uri, str(target), force=True)
    assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_store_in_a_bucket_is_exported_to_this_machine(s3, tmp_path):
    store = Store.create("s3://bucket/store")
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["a"])
    assert export_store(store.uri, str(tmp_path / "out.duckdb"), segments=True).rows["segments"] == 4
    assert {item["Key"].split("/")[0] for item in s3.list_objects_v2(Bucket="bucket")["Contents"]} == {"store"}


def test_the_command_says_what_it_wrote(store, tmp_path):
    command = ["export", "--store", store.uri, "--to", str(tmp_path / "out.duckdb")]
    said = CliRunner().invoke(main, [*command, "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["rows"]["videos"] == 3
    shown = CliRunner().invoke(main, [*command, "--force", "--segments"])
    assert shown.exit_code == 0, shown.output
    assert "answers_wide" in shown.stdout
    assert "out.duckdb" in shown.stdout
