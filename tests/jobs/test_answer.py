import json
import shutil

import pytest

from jobs.answer import AnswerOrder, run_answer
from models import save_clip_tower
from pipeline.language.engine import Request, answer_batch
from pipeline.language.longvlm import load_longvlm
from pipeline.language.questions import Question, ask, read_questions
from pipeline.language.untrained import build_untrained
from pipeline.store import catalog
from pipeline.store.ledger import Store
from pipeline.store.shards import read_tokens
from pipeline.vision.tokens import from_arrow
from schemas.errors import InputError
from schemas.recipe import AnswerRecipe


def order_for(store, *questions, **settings):
    return AnswerOrder(str(store), list(questions), precision="float32", **{"max_new_tokens": 6, **settings})


def rows(store, sql):
    return catalog.query(catalog.connect(Store.open(str(store)).pin()), sql).to_pylist()


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return tmp_path / "store"


def test_answers_are_what_the_model_says_about_the_stored_tokens(store, model):
    report = run_answer(order_for(store, ask("What is red?"), where="duration_s > 3.5"))
    assert report.as_json().items() >= {"asked": 3, "answered": 3, "failed": 0, "reused": 0}.items()
    answers = rows(store, "FROM answers")
    assert sorted(row["answer"] for row in answers) == sorted(row["answer"] for row in report.rows)
    row = answers[0]
    prefix = from_arrow(read_tokens(Store.open(str(store)).pin(), [row["write_id"]])).prefix()
    recipe = AnswerRecipe(model=model, weights="", index_recipe="", precision="float32", max_new_tokens=6)
    (alone,) = answer_batch(load_longvlm(model), [Request(prefix, "What is red?")], recipe)
    assert row["answer"] == alone.text
    assert (row["num_visual_tokens"], row["num_new_tokens"]) == (len(prefix), alone.num_new_tokens)
    assert row["latency_ms"] > 0


def test_what_is_answered_is_not_asked_again(store):
    one, two = Question("q1", "What is red?"), Question("q2", "Why?", video="clip-01")
    run_answer(order_for(store, one, where="duration_s < 1.5"))
    report = run_answer(order_for(store, one, two))
    assert report.as_json().items() >= {"asked": 13, "answered": 13, "reused": 3}.items()
    assert len(rows(store, "FROM answers")) == 13
    again = run_answer(order_for(store, one, two))
    assert (again.reused, again.stages) == (13, {})
    reworded = run_answer(order_for(store, Question("q1", "What is blue?"), where="uri LIKE '%clip-00%'"))
    assert (reworded.asked, reworded.reused) == (1, 0)


def test_a_question_that_cannot_be_answered_is_a_row_and_the_others_arrive(store):
    bad, good = Question("bad", "Is <vid_patch> red?"), Question("good", "Is it red?")
    report = run_answer(order_for(store, bad, good, where="uri LIKE '%clip-02%'"))
    assert (report.as_json()["answered"], report.as_json()["failed"]) == (1, 1)
    (failed,) = rows(store, "FROM answers WHERE status = 'failed'")
    assert failed["question_id"] == "bad"
    assert failed["error_code"] == "answer_failed"


def test_a_second_model_with_the_same_tower_answers_beside_the_first(store, model, tmp_path):
    build_untrained(tmp_path / "other", tower=f"{model}/tower", tower_dim=64, seed=1)
    for name in (None, str(tmp_path / "other")):
        run_answer(order_for(store, ask("What is red?"), model=name, where="uri LIKE '%clip-00%'"))
    assert len(rows(store, "SELECT DISTINCT model FROM answers")) == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"where": "colour = 1"}, "colour"),
        ({"where": "duration_s > 1000"}, "no indexed video is selected"),
        ({"question": Question("q", "What?", video="nobody")}, "names no indexed video"),
        ({"model": "other-tower"}, "looks through the tower"),
        ({"model": "other-tower/tower"}, "LongVLM"),
    ],
)
def test_wrong_input_is_a_sentence_and_writes_nothing(store, tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    save_clip_tower(tmp_path / "other-tower" / "tower", seed=7)
    build_untrained(tmp_path / "other-tower", tower="tower", tower_dim=64)
    question = settings.pop("question", ask("What?"))
    with pytest.raises(InputError, match=says):
        run_answer(order_for(store, question, **settings))
    assert not rows(store, "FROM answers")


def test_a_question_file_names_its_videos(store, tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "question": "What?", "video": f"clip-{i:02}"} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, lines)))
    report = run_answer(order_for(store, *read_questions(str(file))))
    assert report.asked == 3
    assert rows(store, "FROM answers WHERE question_id::INT <> uri[-6:-5]::INT") == []
