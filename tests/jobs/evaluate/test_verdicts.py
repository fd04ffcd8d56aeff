"""Without a model: answers are put into the store, and a stand-in of a judge's server judges them."""

import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
import stores
from stores import rows

from judge_server import LIKES, JudgeServer
from longvlm.jobs.answer.plan import HASH
from longvlm.jobs.evaluate import verdicts as module
from longvlm.jobs.evaluate.verdicts import NOT_IN_STORE, Verdicts, match_videos, read_answered
from longvlm.pipeline.judging import judge_http
from longvlm.pipeline.judging.benchmarks import ITEMS, Benchmark
from longvlm.pipeline.judging.judge_http import HttpChatModel
from longvlm.pipeline.judging.judges import ChatJudge
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from support import HELPERS, ROOT

QA, PAIRED = Benchmark("made-up", video_prefix="v"), Benchmark("paired", "consistency")
RECIPE = "answer-recipe"


@cache
def hash_of(question):
    with duckdb.connect() as con:
        con.execute(HASH)
        return con.execute("SELECT hash_of('text', NULL, NULL, ?)", [question]).fetchall()[0][0]


def answer(store, name, question, text, question_id=None, **changes):
    indexed = f"SELECT write_id, video_id, uri FROM ledger_videos WHERE uri = '{stores.uri_of(name)}'"
    (live,) = rows(store, indexed)  # once; views, which would say what is live, take longer than all else here
    hashed = hash_of(question)
    said = {"question_id": question_id or hashed, "question": question, "question_hash": hashed, "type": "text"}
    said |= {"answer": text, "status": "answered", "answer_recipe": RECIPE, "model": "m", "created_at": datetime.now()}  # noqa: DTZ005
    store.append("answers", pa.Table.from_pylist([live | said | changes], tables.ANSWERS))


def item(video, question="what?", right="a dog", **fields):
    made = dict.fromkeys(ITEMS.names) | {"video": video, "question": question, "answer": right, "type": "text"}
    return made | fields


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of four videos, to be copied."""
    store = Store.create(str(tmp_path_factory.mktemp("made") / "store"))
    store.register_recipe(stores.LONG, "some/model")
    stores.index(store, ["v1", "v2", "v3", "v4"])
    return store.uri


@pytest.fixture
def store(tmp_path, made):
    return Store.open(shutil.copytree(made, str(tmp_path / "store")))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge_http, "_FIRST_PAUSE_S", 0.01)
    made = JudgeServer()
    yield made
    made.stop()


def answered(store, items, benchmark=QA):
    named, _ = match_videos(store, benchmark, items)
    return read_answered(store, benchmark, named, stores.LONG.fingerprint, RECIPE)


def judge(store, server, items, benchmark=QA, run_id="run", **options):
    judged = Verdicts(store, benchmark, ChatJudge(HttpChatModel(server.url, "j")), run_id, RECIPE)
    return judged, dict(judged.judge_answers(answered(store, items, benchmark), **options))


def test_answers_meet_their_items_and_what_is_missing_says_why(store):
    stores.index(store, ["gone"])
    store.append("videos", stores.deleted(["gone"]))
    answer(store, "v1", "what?", "an old one", created_at=datetime(2000, 1, 1))  # noqa: DTZ001
    answer(store, "v1", "what?", "a dog")
    answer(store, "v2", "what?", "a cat", "7.5")
    answer(store, "v3", "what?", None, status="failed")
    answer(store, "v4", "what?", "another model's", answer_recipe="other")
    items = [item(name) for name in ("v1", "v3", "v4", "gone", "unknown")] + [item("2", question_id="7.5")]
    named, num_unknown = match_videos(store, QA, items)
    assert ([one["video"] for one in named], num_unknown) == (["v1", "v3", "v4", "gone", None, "v2"], 1)
    found = answered(store, items)
    statuses = ["answered", "answer_failed", "not_answered", "not_indexed", NOT_IN_STORE, "answered"]
    assert [one.status for one in found] == statuses
    assert (found[0].predictions, found[5].predictions) == (("a dog",), ("a cat",))
    assert found[5].given["question_id"] == "7.5"


def test_paired_questions_have_two_predictions_or_none(store, server):
    pair = {"question": "what?", "question2": "which?", "question_id": "q"}
    answer(store, "v1", "what?", "a dog", "q")
    answer(store, "v1", "which?", "the cat", "q#2")
    answer(store, "v2", "what?", "a dog", "q")
    server.say = lambda *_: "{'score': 1}"
    _, found = judge(store, server, [item("v2", **pair), item("unknown", **pair), item("v1", **pair)], PAIRED)
    assert list(found) == [2]
    assert (found[2]["prediction"], found[2]["prediction2"], found[2]["score"]) == ("a dog", "the cat", 1.0)
    assert all(text in server.requests[0]["messages"][1]["content"] for text in ("which?", "the cat"))


def test_a_verdict_is_a_row_and_is_paid_for_once(store, server):
    for name in ("v1", "v2"):
        answer(store, name, "what?", "a dog")
    items = [item("v1", kind="animals"), item("v2", right="a cat")]
    first, found = judge(store, server, items)
    assert (first.num_new, first.num_reused, len(server.requests)) == (2, 0, 2)
    (row,) = rows(store, "FROM verdicts WHERE uri LIKE '%v1%'")
    expected = {"run_id": "run", "benchmark": "made-up", "dimension": "qa", "kind": "animals", "model": "m"}
    expected |= {"prediction": "a dog", "reference": "a dog", "judge": f"http:j@{server.host}#1", "raw_reply": LIKES}
    expected |= {"score": 4.0, "is_right": True, "status": "judged", "answer_recipe": RECIPE, "error": None}
    assert expected.items() <= row.items()
    again, same = judge(store, server, items, run_id="later")
    assert (again.num_new, again.num_reused, len(server.requests)) == (0, 2, 2)
    assert {place: row["run_id"] for place, row in same.items()} == {0: "run", 1: "run"}
    assert rows(store, "SELECT count(*) AS n FROM ledger_verdicts") == [{"n": 2}]
    assert rows(store, "SELECT num_verdicts, score FROM scores") == [{"num_verdicts": 2, "score": 4.0}]
    assert sorted(found) == sorted(same)


def test_equal_prompts_are_sent_once_and_counted_for_each(store, server):
    for name in ("v1", "v2", "v3"):
        answer(store, name, "what?", "a dog")
    judged, found = judge(store, server, [item(name) for name in ("v1", "v2")])
    assert (sorted(found), judged.num_new, len(server.requests)) == ([0, 1], 2, 1)
    _, found = judge(store, server, [item(name) for name in ("v1", "v2", "v3")])
    assert (sorted(found), len(server.requests)) == ([0, 1, 2], 1)
    assert rows(store, "SELECT count(*) AS n, count(DISTINCT uri) AS v FROM ledger_verdicts") == [{"n": 3, "v": 3}]


def test_another_answer_or_judge_is_judged_anew_and_the_newest_answer_counts(store, server):
    answer(store, "v1", "what?", "a dog")
    judge(store, server, [item("v1")])
    answer(store, "v1", "what?", "a cat")
    server.say = lambda *_: "{'pred': 'no', 'score': 0}"
    judge(store, server, [item("v1")])
    assert len(server.requests) == 2
    assert rows(store, "SELECT prediction, is_right FROM verdicts") == [{"prediction": "a cat", "is_right": False}]
    other = Verdicts(store, QA, ChatJudge(HttpChatModel(server.url, "other")), "run", RECIPE)
    assert len(list(other.judge_answers(answered(store, [item("v1")])))) == 1
    assert len(rows(store, "FROM scores")) == 2


def test_what_failed_is_asked_again_and_what_is_unparsed_is_not(store, server):
    for number in range(1, 4):
        answer(store, f"v{number}", f"what {number}?", "a dog")
    items = [item(f"v{number}", f"what {number}?") for number in range(1, 4)]

    def say(request, _):
        text = request["messages"][1]["content"]
        return "prose" if "what 1" in text else (400, {}, "no") if "what 2" in text else LIKES

    server.say = say
    _, found = judge(store, server, items)
    assert [found[place]["status"] for place in range(3)] == ["unparsed", "failed", "judged"]
    assert (found[0]["raw_reply"], found[1]["error_code"]) == ("prose", "judge_failed")
    num_requests = len(server.requests)
    _, found = judge(store, server, items, run_id="later")
    assert len(server.requests) == num_requests + 1
    server.say = lambda *_: LIKES
    _, found = judge(store, server, items, run_id="last")
    assert [found[place]["status"] for place in range(3)] == ["unparsed", "judged", "judged"]
    assert rows(store, "SELECT num_verdicts, num_judged FROM scores") == [{"num_verdicts": 3, "num_judged": 2}]


def test_the_key_stands_in_no_row(store, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server.say = lambda *_: (400, {}, "your key sk-very-secret is fine")
    answer(store, "v1", "what?", "a dog")
    judge(store, server, [item("v1")])
    assert "very-secret" not in str(rows(store, "FROM ledger_verdicts"))
    assert rows(store, "SELECT error FROM ledger_verdicts")[0]["error"].count("your key ...") == 1


def test_denied_access_keeps_what_came_before(store, server, monkeypatch):
    monkeypatch.setattr(judge_http, "CONCURRENCY", 1)
    for number in range(1, 5):
        answer(store, f"v{number}", "what?", f"dog {number}")
    server.say = lambda _, number: (401, {}, "expired") if number >= 2 else LIKES
    with pytest.raises(InputError, match="refuses access"):
        judge(store, server, [item(f"v{number}") for number in range(1, 5)])
    assert len(rows(store, "FROM ledger_verdicts")) == 2


def test_a_caller_that_may_not_ask_gets_what_is_known(store, server):
    for name in ("v1", "v2"):
        answer(store, name, "what?", name)
    judge(store, server, [item("v1")])
    judged, found = judge(store, server, [item("v1"), item("v2")], may_ask=False)
    assert (list(found), judged.num_reused, len(server.requests)) == ([0], 1, 1)


def test_a_driver_that_is_killed_loses_little_and_the_next_repeats_nothing(store, server):
    """Every verdict is committed at once; the server falls silent after three."""
    questions = [f"what {number}?" for number in range(8)]
    for question in questions:
        answer(store, "v1", question, "a dog")
    server.say = lambda _, number: LIKES if number < 3 else 60.0
    code = f"""
import sys
sys.path[:0] = {[str(HELPERS), str(Path(__file__).parent)]!r}
import test_verdicts as helper
from longvlm.jobs.evaluate import verdicts
from longvlm.pipeline.judging import judge_http
verdicts.COMMIT_VERDICTS = judge_http.CONCURRENCY = 1
store = helper.Store.open({store.uri!r})
judge = helper.ChatJudge(helper.HttpChatModel({server.url!r}, "j"))
answered = helper.answered(store, [helper.item("v1", question) for question in {questions!r}])
list(helper.Verdicts(store, helper.QA, judge, "killed", helper.RECIPE).judge_answers(answered))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(server.requests) < 4 and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while len(rows(store, "FROM ledger_verdicts")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    server.say = lambda *_: LIKES
    before = len(server.requests)
    judged, found = judge(store, server, [item("v1", question) for question in questions])
    assert (len(found), judged.num_reused, judged.num_new, len(server.requests) - before) == (8, 3, 5, 5)
    assert rows(store, "SELECT count(*) AS n FROM ledger_verdicts") == [{"n": 8}]


def test_rows_are_committed_every_so_often(store, server, monkeypatch):
    monkeypatch.setattr(module, "COMMIT_VERDICTS", 2)
    monkeypatch.setattr(judge_http, "CONCURRENCY", 1)
    for number in range(5):
        answer(store, "v1", f"what {number}?", "a dog")
    judged = Verdicts(store, QA, ChatJudge(HttpChatModel(server.url, "j")), "run", RECIPE)
    counts = []
    for _ in judged.judge_answers(answered(store, [item("v1", f"what {number}?") for number in range(5)])):
        counts.append(len(rows(store, "FROM ledger_verdicts")))  # noqa: PERF401 - counted while it runs
    assert counts == [0, 2, 2, 4, 4]
    assert len(rows(store, "FROM ledger_verdicts")) == 5
