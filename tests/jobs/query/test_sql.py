"""`longvlm sql`: reads the store and what is attached, says so where a query wants more, and leaves nothing behind."""

import json

import pytest
import stores
from click.testing import CliRunner

from longvlm.jobs.cli import main
from longvlm.pipeline.store.ledger import Store


@pytest.fixture
def store(tmp_path):
    made = Store.create(str(tmp_path / "store"))
    made.register_recipe(stores.LONG, "some/model")
    stores.index(made, ["a", "b"])
    (tmp_path / "owners.csv").write_text(f"uri,owner\n{stores.uri_of('a')},me\nelsewhere,you\n")
    (tmp_path / "sites.jsonl").write_text('{"owner": "me", "site": "north"}\n')
    return made.uri


def sql(store, *args):
    return CliRunner().invoke(main, ["sql", "--store", store, *args, "--quiet"], catch_exceptions=False)


def test_files_are_joined_by_name(store, tmp_path):
    attached = ("--attach", f"owners={tmp_path}/owners.csv", "--attach", f"sites={tmp_path}/sites.jsonl")
    query = "SELECT uri, owner, site FROM videos JOIN owners USING (uri) JOIN sites USING (owner)"
    said = sql(store, query, *attached, "--json")
    assert said.exit_code == 0, said.output
    assert [json.loads(line) for line in said.stdout.splitlines()] == [
        {"uri": stores.uri_of("a"), "owner": "me", "site": "north"}
    ]
    assert "north" in sql(store, query, *attached).stdout


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("FROM read_text('BESIDE/owners.csv')", "Cannot access file"),
        ("FROM 'BESIDE/owners.csv'", "Cannot access file"),
        ("SELECT * FROM read_csv('/etc/passwd')", "Cannot access file"),
        ("COPY videos TO 'BESIDE/out.csv'", "must be one SELECT"),
        ("ATTACH 'BESIDE/out.duckdb'", "must be one SELECT"),
        ("SET enable_external_access = true", "must be one SELECT"),
        ("SELECT 1; COPY videos TO 'BESIDE/out.csv'", "must be one SELECT"),
    ],
)
def test_nothing_else_is_read_and_nothing_is_written(store, tmp_path, query, sentence):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = sql(store, query.replace("BESIDE", str(tmp_path)))
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_wrong_attachment_is_wrong_input(store):
    said = sql(store, "FROM videos", "--attach", "videos=x.csv")
    assert said.exit_code == 2
    assert "the name videos is taken" in said.stderr
