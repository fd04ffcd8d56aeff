import contextlib
import io
import re

import pytest

from longvlm.jobs.demo import NUM_VIDEOS, QUESTIONS_PER_VIDEO, _draw, run_demo
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.tinyworld.world import make_world, read_question_rows

ASKED = NUM_VIDEOS * QUESTIONS_PER_VIDEO


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        share = run_demo(folder, seed=4711)
    return folder, shown.getvalue(), share


def test_answers_stand_beside_the_truth_and_the_score_is_what_it_is(demo):
    folder, shown, share = demo
    with catalog.connect(Store.open(str(folder / "store")).pin()) as con:
        assert con.execute("SELECT count(*) FROM answers WHERE status = 'answered'").fetchall() == [(ASKED,)]
    verdicts = re.findall(r" (right|wrong) *$", shown, re.MULTILINE)
    assert len(verdicts) == ASKED
    assert f"{verdicts.count('right')} of {ASKED} answers are right" in shown
    assert share == verdicts.count("right") / ASKED


def test_the_shipped_model_knows_its_world(demo):
    assert demo[2] > 0.6  # what it reaches on many videos stands in the README; 24 questions are few


def test_the_store_stays_and_its_queries_run(demo):
    folder, shown, _ = demo
    assert str(folder / "store") in shown
    queries = re.findall(r'longvlm sql --store \S+ "([^"]+)"', shown.replace("\n", " "))
    assert len(queries) == 3
    with catalog.connect(Store.open(str(folder / "store")).pin()) as con:
        for query in queries:
            assert catalog.query(con, query).num_rows > 0


def test_questions_are_drawn_by_seed_each_of_another_kind(tmp_path):
    rows = read_question_rows(make_world(tmp_path / "other", 4712, 2))
    assert _draw(rows, 1) == _draw(rows, 1) != _draw(rows, 2)
    assert len({row["kind"] for row in _draw(rows, 1) if row["video"].endswith("00000")}) == QUESTIONS_PER_VIDEO
