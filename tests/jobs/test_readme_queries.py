"""The README's queries, run on a real store with answers in it."""

import shutil

import duckdb
import pytest

from jobs.answer import AnswerOrder, run_answer
from pipeline.language.questions import ask
from pipeline.store import catalog
from pipeline.store.ledger import Store
from support import ROOT

QUERIES = (ROOT / "README.md").read_text().split("```sql\n")[1].split("```")[0].strip().split(";\n")


@pytest.fixture(scope="module")
def answered(indexed, tmp_path_factory):
    store = tmp_path_factory.mktemp("answered") / "store"
    shutil.copytree(indexed, store)
    run_answer(AnswerOrder(str(store), [ask("What is red?")], precision="float32", max_new_tokens=4))
    return store


@pytest.mark.parametrize("query", QUERIES, ids=[query.strip().splitlines()[0][3:] for query in QUERIES])
def test_a_query_of_the_readme_runs(answered, query):
    query = query.rstrip(";")
    rows = catalog.query(catalog.connect(Store.open(str(answered)).pin()), query).to_pylist()
    with duckdb.connect(str(answered / "index.duckdb"), read_only=True) as con:
        assert len(con.execute(query).fetchall()) == len(rows)
    if "score" in query:
        assert rows[0]["score"] == pytest.approx(1, abs=1e-5)
    if "compute_h" in query:
        assert rows[0]["video_s_per_compute_h"] > 0
    if "FROM segments WHERE" in query:
        assert [row["segment"] for row in rows] == [0, 1]
