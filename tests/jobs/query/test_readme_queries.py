"""The README's queries and the data dictionary, held against a real store with answers in it."""

import runpy
import shutil

import duckdb
import pytest
from documents import blocks, statements

from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.pipeline.answering.questions import ask
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.tables import TABLES
from support import ROOT

QUERIES = statements(*blocks((ROOT / "README.md").read_text(), "sql"))


@pytest.fixture(scope="module")
def answered(indexed, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    shutil.copytree(indexed, folder / "store")
    build_untrained(folder / "other", tower=f"{model}/tower", tower_dim=64, seed=1)
    for name in (model, str(folder / "other")):
        order = AnswerOrder(str(folder / "store"), ask("What is red?"), model=name, limit=3, max_new_tokens=4)
        run_answer(order)
    return folder / "store"


@pytest.mark.parametrize("query", QUERIES, ids=[query.splitlines()[0][3:] for query in QUERIES])
def test_a_query_of_the_readme_runs(answered, query):
    rows = catalog.query(catalog.connect(Store.open(str(answered)).pin()), query).to_pylist()
    with duckdb.connect(str(answered / "index.duckdb"), read_only=True) as con:
        assert len(con.execute(query).fetchall()) == len(rows)
    if "score" in query:
        assert rows[0]["score"] == pytest.approx(1, abs=1e-5)
    if "compute_h" in query:
        assert rows[0]["video_s_per_compute_h"] > 0
    if "FROM segments WHERE" in query:
        assert [row["segment"] for row in rows] == [0, 1]
    if "other_answer" in query:
        assert len(rows) == 3
        assert all(row["answer"] and row["other_answer"] for row in rows)


def test_what_the_dictionary_calls_never_null_is_never_null(answered):
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    told = generate["DICTIONARY"]
    columns = {f"ledger_{name}": (told["tables"][name], schema.names) for name, schema in TABLES.items()}
    columns |= {
        name: (told["views"][name], [column for column, _ in found]) for name, found in generate["views"]().items()
    }
    num_filled = 0
    with catalog.connect(Store.open(str(answered)).pin()) as con:
        for relation, (sentences, names) in columns.items():
            never = [name for name in names if "null" not in generate["meaning"](sentences, name)]
            counted = ", ".join(f"count({name})" for name in never)
            num_rows, *filled = con.execute(f"SELECT count(*), {counted} FROM {relation}").fetchall()[0]
            assert dict(zip(never, filled, strict=True)) == dict.fromkeys(never, num_rows), relation
            num_filled += num_rows > 0
    assert num_filled > len(columns) / 2
