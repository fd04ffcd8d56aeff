import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pytest
from stores import rows

from longvlm.jobs.answer.stage import Answerer
from longvlm.jobs.answer.terms import AnswerTerms
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.cluster.resources import for_answer
from longvlm.jobs.cluster.tally import MAX_ATTEMPTS, StageReporter, Tally
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group, Request
from longvlm.pipeline.models.families import describe_model, load_model, sight_of
from longvlm.pipeline.models.longvlm.model import LongVLM
from longvlm.pipeline.models.prefix import VideoPrefix, prefix_of
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_segments, read_tokens
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas import tables
from longvlm.schemas.recipe import AnswerRecipe


def question(question_id, text, kind="text", choices=None, schema=None):
    hashed = f"hash-{question_id}"
    return {
        "question_id": question_id, "question": text, "question_hash": hashed,
        "type": kind, "choices": choices, "schema": schema,
    }  # fmt: skip


RED = question("red", "What is red?")


@pytest.fixture
def answering(indexed, model):
    """Makes an answerer over the indexed clips, and groups for it."""
    snapshot = Store.open(indexed).pin()
    spec, stored = choose_answer_model(Store.open(indexed), model)
    recipe = AnswerRecipe(spec.name, spec.weights, stored.recipe.fingerprint, precision="float32", max_new_tokens=6)
    videos = rows(indexed, "SELECT video_id, uri, write_id FROM live_videos ORDER BY uri")

    def make(**settings):
        tally = Tally()
        made_for = replace(recipe, **settings)
        terms = AnswerTerms(made_for, sight_of(made_for.model), snapshot, "run", stored.recipe.tower.name)
        return Answerer(terms, tally, for_answer({"CPU": 1}, 1)), tally

    def groups(*questions, count=2):
        return pa.Table.from_pylist(
            [{**video, "questions": list(questions)} for video in videos[:count]], tables.GROUPS
        )

    return make, groups


def rows_of(answerer, groups):
    made = pa.concat_tables([tables.ANSWERS.empty_table(), *answerer(groups)])
    assert made.schema == tables.ANSWERS
    return sorted(made.to_pylist(), key=lambda row: (row["uri"], row["question_id"]))


def test_answers_are_what_the_model_says_about_the_stored_tokens(answering, model, indexed):
    make, groups = answering
    answerer, tally = make()
    rows = rows_of(answerer, groups(RED, count=3))
    assert [row["status"] for row in rows] == ["answered"] * 3
    for row in rows:
        prefix = from_arrow(read_tokens(Store.open(indexed).pin(), [row["write_id"]])).prefix()
        engine = Engine(load_model(model), answerer.recipe)
        (alone,) = engine.answer([Group(VideoPrefix(prefix), [Request("it", "What is red?")])])
        assert row["answer"] == alone.text
        assert (row["num_visual_tokens"], row["num_new_tokens"]) == (len(prefix), alone.num_new_tokens)
        assert (row["value"], row["confidence"]) == (None, None)
        assert row["answer_recipe"] == answerer.recipe.fingerprint
    report = tally.report()
    assert report["answer"]["done"] == 3
    assert report["prefill"]["done"] > sum(row["num_visual_tokens"] for row in rows)
    assert report["decode"]["done"] == sum(row["num_new_tokens"] - 1 for row in rows)


def test_typed_answers_have_values_and_those_of_options_confidence(answering):
    make, groups = answering
    typed = [
        question("1", "Is it red?", "bool"),
        question("2", "Which color?", "choice", choices=["red", "blue", "green"]),
        question("3", "How many squares?", "number"),
        question("4", "What is there?", "json", schema='{"type":"object"}'),
    ]
    yes, color, number, thing = rows_of(make()[0], groups(*typed, count=1))
    assert yes["answer"] in ("Yes", "No")
    assert yes["value"] == {"Yes": "true", "No": "false"}[yes["answer"]]
    assert 0.5 <= yes["confidence"] <= 1
    assert color["answer"] == color["value"] in ("red", "blue", "green")
    assert 1 / 3 <= color["confidence"] <= 1
    assert yes["num_new_tokens"] == color["num_new_tokens"] == 0
    assert (number["status"], number["confidence"]) == ("answered", None)
    assert float(number["value"]) == float(number["answer"])
    assert (thing["status"], thing["error_code"]) == ("failed", "answer_failed")  # the model's words have no brace
    assert "spelt" in thing["error"]


def test_a_row_says_what_was_thought_and_how_words_were_chosen(answering, monkeypatch):
    make, groups = answering
    monkeypatch.setattr(LongVLM, "decode", lambda *_: "<think>It was there.</think> Red.")
    (row,) = rows_of(make(temperature=0.7, top_p=0.8)[0], groups(RED, count=1))
    assert (row["answer"], row["thinking"], row["error"]) == ("Red.", "It was there.", None)
    assert row["decoding"] == "temperature 0.7, top_p 0.8, seed 0"
    monkeypatch.setattr(LongVLM, "decode", lambda *_: "<think>It was")
    typed = question("typed", "Is it red?", "bool")
    row, held = rows_of(make(max_new_tokens=1)[0], groups(RED, typed, count=1))
    assert (row["status"], row["error_code"], row["answer"]) == ("failed", "cut_off", None)
    assert row["thinking"] == "It was"
    assert row["error"].endswith("raise --max-new-tokens.")
    assert row["num_new_tokens"] == 1
    assert (held["status"], held["thinking"], held["decoding"]) == ("answered", None, "greedy")


def test_evidence_lies_within_segments_and_sums_to_one(answering, indexed):
    make, groups = answering
    con = catalog.connect(Store.open(indexed).pin())
    for row in rows_of(make()[0], groups(RED, question("bool", "Is it red?", "bool"))):
        sql = f"SELECT start_s, end_s FROM segments WHERE write_id = '{row['write_id']}'"
        segments = con.execute(sql).fetchall()
        assert row["evidence"]
        for span in row["evidence"]:
            assert any(start <= span["start_s"] < span["end_s"] <= end for start, end in segments)
        assert sum(span["weight"] for span in row["evidence"]) == pytest.approx(1)


def test_a_budget_is_kept_and_told(answering):
    make, groups = answering
    rows = rows_of(make(budget=9)[0], groups(RED, count=4))
    assert {row["num_visual_tokens"] for row in rows} == {9}
    rows = rows_of(make(tokens_per_segment=2, budget=100)[0], groups(RED, count=4))
    assert {row["num_visual_tokens"] for row in rows} == {5 + 2, 5 + 4}  # clips of up to two segments


def test_a_budget_that_is_too_small_fails_its_questions_and_says_what_to_do(answering):
    make, groups = answering
    rows = rows_of(make(budget=6)[0], groups(RED, RED | {"question_id": "again"}, count=4))
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    assert {row["error_code"] for row in failed} == {"budget_too_small"}
    assert "--focus even" in failed[0]["error"]
    assert {row["status"] for row in rows_of(make(budget=6, focus="even")[0], groups(RED, count=4))} == {"answered"}


def test_a_focus_gives_each_question_the_segments_nearest_to_it_and_its_row_says_which(answering):
    make, groups = answering
    answerer, _ = make(budget=5 + 8 + 2, focus="question")
    seen = []
    answer = answerer.engine.answer

    def watched(source):
        def noted():
            for group in source:
                seen.append(group)
                yield group

        return answer(noted())

    answerer.engine.answer = watched
    texts = ("What is seen at 0:00?", "And at 0:01?", "What is at 0:02?", "A red square.")
    rows = rows_of(answerer, groups(*(question(str(i), text) for i, text in enumerate(texts)), count=4))
    assert [row["status"] for row in rows] == ["answered"] * 16
    of_two = [row for row in rows if row["focus"]]
    assert len(of_two) == 8  # two of the four clips have two segments, of which the budget holds one
    assert {row["focus"] for row in of_two} == {"question"}
    assert [row["kept_segments"] for row in of_two if row["question_id"] in "012"] == [[0], [0], [1]] * 2
    assert {row["num_visual_tokens"] for row in of_two} == {15}
    assert all(row["kept_segments"] is None for row in rows if not row["focus"])
    shared = [len(group.requests) for group in seen if len(group.prefix.rows) == 15]
    assert max(shared) >= 2  # who keeps the same segments shares a prefix
    assert sum(shared) == 8


def test_auto_says_what_it_decided(answering):
    make, groups = answering
    asked = (question("1", "How many are there?"), question("2", "What is seen at 0:02?"))
    rows = rows_of(make(budget=5 + 8 + 2, focus="auto")[0], groups(*asked, count=4))
    told = [(row["focus"], row["kept_segments"]) for row in rows if row["focus"]]
    assert told == [("even", None), ("question", [1])] * 2


def test_questions_that_kill_their_workers_fail_and_those_beside_them_are_asked_alone(answering):
    make, groups = answering
    answerer, tally = make()
    table = groups(RED, question("bad", "What?"), count=2)
    write_id = table["write_id"][0].as_py()
    for attempt in range(MAX_ATTEMPTS):
        StageReporter("answer", tally).begin([f"{write_id}/bad"] + [f"{write_id}/red"] * (attempt == 0))
    rows = rows_of(answerer, table)
    assert len(rows) == 4
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["write_id"], row["question_id"], row["error_code"]) for row in failed] == [(write_id, "bad", "lost")]


def test_tokens_that_cannot_be_used_fail_their_own_questions(answering, monkeypatch):
    make, groups = answering
    answerer, _ = make()
    table = groups(RED, count=3)
    broken = table["write_id"][1].as_py()

    def read(snapshot, write_ids):
        rows = read_tokens(snapshot, write_ids).to_pylist()
        for row in rows:
            if row["write_id"] == broken:
                row["local"] = b"\x00\x7e" + row["local"][2:]  # NaN in float16
        return pa.Table.from_pylist(rows, tables.TOKENS)

    monkeypatch.setattr("longvlm.jobs.stored_videos.read_tokens", read)
    rows = rows_of(answerer, table)
    assert {row["write_id"]: row["error_code"] for row in rows if row["status"] == "failed"} == {broken: "bad_tokens"}
    assert sum(row["status"] == "answered" for row in rows) == 2


def test_a_network_that_fails_is_a_row_that_the_next_run_asks_again(answering, monkeypatch):
    make, groups = answering

    def read(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr("longvlm.jobs.stored_videos.read_tokens", read)
    rows = rows_of(make()[0], groups(RED))
    assert [(row["status"], row["error_code"]) for row in rows] == [("failed", "network")] * 2
    assert "no route" in rows[0]["error"]


def test_a_model_with_time_markers_is_told_when_segments_began(answering, model, indexed, tmp_path):
    folder = shutil.copytree(model, tmp_path / "marked")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_prompt_layout": "time_markers"}))
    make, groups = answering
    marked = {"model": str(folder), "weights": describe_model(str(folder)).weights}
    rows = rows_of(make(**marked)[0], groups(RED, count=4))
    (fitted,) = rows_of(make(**marked, budget=40, focus="even")[0], groups(RED, count=4).slice(3))
    at = question("at", "What is seen at 0:02?")
    (focused,) = rows_of(make(**marked, budget=17, focus="question")[0], groups(at, count=4).slice(3))
    for row in rows:
        snapshot = Store.open(indexed).pin()
        segments = read_segments(snapshot, [row["write_id"]]).to_pylist()
        stored = from_arrow(read_tokens(snapshot, [row["write_id"]]))
        loaded = load_model(str(folder))
        prefix = prefix_of(stored, segments, sight_of(str(folder)))
        (alone,) = Engine(loaded, make(**marked)[0].recipe).answer([Group(prefix, [Request("it", "What is red?")])])
        assert row["answer"] == alone.text
        beside = sum(loaded.num_text_rows(segment["start_s"], segment["end_s"]) for segment in segments)
        assert row["num_visual_tokens"] == len(stored.prefix()) + beside
        assert row["evidence"]
    assert fitted["status"] == "answered"
    assert fitted["num_visual_tokens"] <= 40
    assert (focused["status"], focused["focus"], focused["kept_segments"]) == ("answered", "question", [1])
    assert focused["num_visual_tokens"] == 17
