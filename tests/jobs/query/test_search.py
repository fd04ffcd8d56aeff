import shutil

import numpy as np
import pyarrow as pa
import pytest
import stores

from longvlm.jobs.answer.loaded import LoadedModel
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.query import verify as module
from longvlm.jobs.query.search import SearchOrder, find_moments
from longvlm.jobs.query.verify import verify
from longvlm.pipeline.answering.questions import ask
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import search
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError

QUESTION = "Is it red?"


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return Store.open(str(tmp_path / "store"))


def test_a_yes_is_that_of_an_answer_about_these_segments(store):
    run_answer(AnswerOrder(store.uri, ask(QUESTION, "bool"), precision="float32"))
    answers = {row["uri"]: row for row in stores.rows(store, "FROM answers")}
    told = {row["uri"]: row["num_segments"] for row in stores.rows(store, "FROM videos")}
    snapshot = store.pin()
    width = len(stores.rows(store, "FROM segments LIMIT 1")[0]["embedding"])
    hits = search(snapshot, np.ones(width, np.float32), limit=99).rows
    assert {hit.uri for hit in hits} == {*answers}
    verified = verify(LoadedModel(store, None, "float32"), snapshot, hits, QUESTION)
    assert not verified.problems
    for hit, yes in zip(hits, verified.yes, strict=True):
        assert told[hit.uri] <= 2  # so that all of a video is beside each hit
        answer = answers[hit.uri]
        share = answer["confidence"] if answer["value"] == "true" else 1 - answer["confidence"]
        assert yes == pytest.approx(share, abs=1e-5)
    assert "was not measured on this store" in verified.calibration


def test_only_the_segment_and_its_neighbours_are_looked_at():
    rows = pa.table({"segment": [0, 1, 2, 3, 4]})
    assert module._around(rows, 2)["segment"].to_pylist() == [1, 2, 3]
    assert module._around(rows, 0)["segment"].to_pylist() == [0, 1]


def test_what_was_judged_says_how_far_a_yes_can_be_trusted(store):
    run_answer(AnswerOrder(store.uri, ask(QUESTION, "bool"), precision="float32"))
    answers = stores.rows(store, "FROM answers")
    columns = ("run_id", "question_id", "question", "video_id", "uri", "write_id", "answer_recipe", "model")
    judged = [
        {**{name: row[name] for name in columns}, "benchmark": "b", "dimension": "qa", "judge": "exact", "seq": 1}
        | {"is_right": place < 9, "status": "judged"}
        for place, row in enumerate(answers)
    ]
    store.append("verdicts", pa.Table.from_pylist(judged, tables.VERDICTS))
    spec, _ = choose_answer_model(store, None)
    said = module._calibration(store.pin(), spec)
    assert f"the {len(answers)} yes/no answers of this store that were judged" in said
    assert "points from the share that is right" in said


def test_hits_come_by_score_or_by_yes(store):
    order = SearchOrder(store.uri, "red", limit=5, verify="")
    by_score = find_moments(order)
    assert by_score.question == "Is there red?"
    scores = [hit["score"] for hit in by_score.hits]
    assert scores == sorted(scores, reverse=True)
    by_yes = find_moments(SearchOrder(store.uri, "red", limit=5, verify="", by="yes"))
    yes = [hit["yes"] for hit in by_yes.hits]
    assert yes == sorted(yes, reverse=True)
    assert sorted(yes) == sorted(hit["yes"] for hit in by_score.hits)


def test_sorting_by_yes_needs_one(store):
    with pytest.raises(InputError, match="add --verify"):
        find_moments(SearchOrder(store.uri, "red", by="yes"))


def test_a_hit_whose_tokens_are_gone_has_no_yes_and_the_others_have_theirs(store, monkeypatch):
    (lost,) = stores.rows(store, "FROM live_videos WHERE uri LIKE '%clip-03%'")
    read = module.read_tokens

    def without(snapshot, write_ids):
        rows = read(snapshot, write_ids)
        return rows.slice(0, 0) if write_ids == [lost["write_id"]] else rows

    monkeypatch.setattr(module, "read_tokens", without)
    found = find_moments(SearchOrder(store.uri, "red", limit=99, verify="", by="yes"))
    assert {hit["uri"] for hit in found.hits if hit["yes"] is None} == {lost["uri"]}
    assert found.hits[0]["yes"] is not None
    assert any("index the video again" in note for note in found.notes)
