import contextlib
import io
import re

import pytest

from longvlm.jobs.demo import NUM_VIDEOS, QUESTIONS_PER_VIDEO, _command, _draw, run_demo
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store

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
    assert f"longvlm serve --store {folder / 'store'}" in shown
    with catalog.connect(Store.open(str(folder / "store")).pin()) as con:
        for query in queries:
            assert catalog.query(con, query).num_rows > 0


def test_questions_are_drawn_by_seed_each_of_another_kind_and_half_of_them_typed():
    drawn = _draw(1, 2)
    assert drawn == _draw(1, 2) != _draw(2, 2)
    assert len({row["kind"] for row in drawn if row["video"].endswith("00000")}) == QUESTIONS_PER_VIDEO
    assert [row["type"] == "text" for row in drawn] == [True, False] * QUESTIONS_PER_VIDEO


def test_typed_answers_stand_with_their_values(demo):
    folder, shown, _ = demo
    with catalog.connect(Store.open(str(folder / "store")).pin()) as con:
        typed = con.execute("SELECT value, status FROM answers WHERE type <> 'text'").fetchall()
    assert len(typed) == ASKED // 2
    assert {status for _, status in typed} == {"answered"}
    assert all(value in shown for value, _ in typed)


@pytest.mark.parametrize(
    ("called", "found", "said"),
    [
        (".venv/bin/longvlm", None, ".venv/bin/longvlm"),
        ("/my tools/longvlm", None, "'/my tools/longvlm'"),
        (".venv/bin/longvlm", ".venv/bin/longvlm", "longvlm"),
        ("pytest", None, "longvlm"),
    ],
)
def test_the_command_to_try_next_is_one_that_a_shell_finds(monkeypatch, called, found, said):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda _: found)
    assert _command() == said
