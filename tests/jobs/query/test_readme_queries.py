"""The README's queries, run on a real store with answers in it."""

import shutil

import duckdb
import pytest

from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.pipeline.answering.questions import ask
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from support import ROOT

QUERIES = (ROOT / "README.md").read_text().split("```sql\n")[1].split("```")[0].strip().split(";\n")


@pytest.fixture(scope="module")
def answered(indexed, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    shutil.copytree(indexed, folder / "store")
    build_untrained(folder / "other", tower=f"{model}/tower", tower_dim=64, seed=1)
    for name in (model, str(folder / "other")):
        order = AnswerOrder(str(folder / "store"), ask("What is red?"), model=name, limit=3, max_new_tokens=4)
        run_answer(order)
    return folder / "store"


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
    if "other_answer" in query:
        assert len(rows) == 3
        assert all(row["answer"] and row["other_answer"] for row in rows)
