import json
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from judge_server import LIKES, JudgeServer, chat, once
from longvlm.pipeline.judging import judge_http
from longvlm.pipeline.judging.judge_http import HttpChatModel
from longvlm.pipeline.judging.judges import Case, ChatJudge, judge_all
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError, TransientError

HELLO = [{"role": "user", "content": "hello"}]
QUESTION = {"question": "What?", "question2": None, "answer": "a dog", "type": "text", "choices": None, "schema": None}
CASE = Case("qa", QUESTION, ("the dog",))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(judge_http, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server():
    made = JudgeServer()
    yield made
    made.stop()


def chat_with(server, **settings):
    return HttpChatModel(server.url, "judge-1", **settings)


def test_a_request_names_the_model_and_leaves_nothing_to_chance(server):
    talk = chat_with(server)
    assert talk.reply(HELLO) == LIKES
    assert talk.name == f"http:judge-1@{server.host}"
    expected = {"model": "judge-1", "messages": HELLO, "temperature": 0, "path": "/v1/chat/completions"}
    assert server.requests == [expected]
    assert "Authorization" not in server.headers[0]
    assert HttpChatModel(f"{server.url}/chat/completions/", "m").reply(HELLO) == LIKES
    assert server.requests[1]["path"] == "/v1/chat/completions"
    HttpChatModel(f"{server.url}?api-version=1", "m").reply(HELLO)
    assert server.requests[2]["path"] == "/v1/chat/completions?api-version=1"


def test_the_key_goes_out_and_never_comes_back(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    server.say = lambda _, number: "sk-secret-1 {'score': 1}" if number == 0 else (400, {}, "bad key sk-secret-1")
    talk = chat_with(server, key_variable="MY_KEY")
    assert talk.reply(HELLO) == "... {'score': 1}"
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-1"
    with pytest.raises(TerminalError) as refused:
        talk.reply(HELLO)
    assert "bad key ..." in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 408])
def test_what_may_pass_is_tried_again(server, status):
    server.say = once((status, {}, "busy"))
    assert chat_with(server).reply(HELLO) == LIKES
    assert len(server.requests) == 2


def test_a_server_is_given_the_time_it_asks_for(server):
    server.say = once((429, {"Retry-After": "0.3"}, "slow down"))
    started = time.monotonic()
    assert chat_with(server).reply(HELLO) == LIKES
    assert time.monotonic() - started > 0.25


def test_the_time_may_be_asked_for_as_a_date():
    asked = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 90 < judge_http._pause_s(0, judge_http._asked_wait_s(asked)) <= 100


def test_no_server_is_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(judge_http, "_LONGEST_WAIT_S", 0.5)
    assert judge_http._pause_s(0, 3600.0) == 0.5
    assert judge_http._asked_wait_s("soon") is None


@pytest.mark.parametrize(
    ("said", "family", "code", "reason"),
    [
        ((503, {}, "busy"), TransientError, "network", "503: busy"),
        ((200, {}, "<html>"), TerminalError, "judge_failed", "no chat reply: <html>"),
        ((200, {}, '{"choices": []}'), TerminalError, "judge_failed", "no chat reply"),
        ((200, {}, '{"choices": [{"message": null}]}'), TerminalError, "judge_failed", "no chat reply"),
        ((200, {}, json.dumps(chat(None))), TerminalError, "judge_failed", "holds no text"),
    ],
)
def test_what_does_not_pass_fails_after_five_tries(server, said, family, code, reason):
    server.say = lambda *_: said
    with pytest.raises(family, match=reason) as failed:
        chat_with(server).reply(HELLO)
    assert failed.value.code == ErrorCode(code)
    assert len(server.requests) == 5


def test_a_silent_server_is_a_timeout(server):
    server.say = once(0.6)
    assert chat_with(server, timeout_s=0.2).reply(HELLO) == LIKES
    assert len(server.requests) == 2


def test_a_refused_connection_fails_as_network():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(TransientError, match="gave no reply in 5 tries"):
        HttpChatModel(f"http://127.0.0.1:{port}/v1", "m").reply(HELLO)


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "refuses access"), (403, "into OPENAI_API_KEY"), (404, "knows no model judge-1")],
)
def test_a_judge_that_can_never_answer_is_wrong_input_at_once(server, status, says):
    server.say = lambda *_: (status, {}, "no")
    with pytest.raises(InputError, match=says):
        chat_with(server).reply(HELLO)
    assert len(server.requests) == 1


def test_any_other_refusal_is_of_this_one_request(server):
    server.say = lambda *_: (400, {}, "too long")
    with pytest.raises(TerminalError, match=r"refused \(400: too long\)"):
        chat_with(server).reply(HELLO)


@pytest.mark.parametrize("url", ["host/v1", "ftp://host/v1", "https://me:pw@host/v1", "http://", "http://host:port/v1"])
def test_an_address_is_https_without_secrets(url):
    with pytest.raises(InputError, match="URL must be like") as refused:
        HttpChatModel(url, "m")
    assert "pw" not in str(refused.value)


def test_a_key_variable_that_is_named_must_be_set(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(InputError, match="NO_KEY with the judge's key is not set"):
        HttpChatModel("https://host/v1", "m", "NO_KEY")
    monkeypatch.setenv("NO_KEY", "a\nb")
    with pytest.raises(InputError, match="NO_KEY holds no key"):
        HttpChatModel("https://host/v1", "m", "NO_KEY")


def test_what_no_table_could_hold_is_replaced(server):
    server.say = lambda *_: (200, {}, json.dumps(chat("half \ud800 a pair")))
    assert chat_with(server).reply(HELLO) == "half ? a pair"


def test_a_closed_chat_does_not_go_on_trying(server):
    server.say = lambda *_: (503, {"Retry-After": "100"}, "busy")
    judge = ChatJudge(chat_with(server))
    verdicts = judge_all(judge, [(0, CASE), *((i, CASE) for i in range(1, 4))])
    started = time.monotonic()
    judge.close()
    assert [verdict.status for _, verdict in verdicts] == ["failed"] * 4
    assert time.monotonic() - started < 30


def test_of_a_batch_some_fail_and_all_are_told_once(server):
    def say(request, _):
        text = request["messages"][1]["content"]
        number = int(text.split("number ")[1].split('"')[0])
        if number % 10 == 0:
            return (400, {}, "no")
        return "prose" if number % 10 == 1 else (503, {}, "") if number % 10 == 2 else LIKES

    server.say = say
    cases = [(i, Case("qa", QUESTION | {"question": f"number {i}"}, ("x",))) for i in range(40)]
    found = dict(judge_all(ChatJudge(chat_with(server)), cases))
    assert sorted(found) == list(range(40))
    statuses = [found[i].status for i in range(10)]
    assert statuses == ["failed", "unparsed", "failed", *["judged"] * 7]
    assert (found[0].error_code, found[2].error_code) == (ErrorCode.JUDGE_FAILED, ErrorCode.NETWORK)
    assert len(server.requests) == 4 * (1 + 2 + 5 + 7)


def test_what_was_under_way_when_access_is_denied_is_not_lost(server):
    server.say = lambda _, number: (401, {}, "revoked") if number == 20 else LIKES
    cases = ((i, Case("qa", QUESTION | {"question": f"{i}"}, ("x",))) for i in range(100))
    found = []
    with pytest.raises(InputError, match="refuses access"):
        found.extend(judge_all(ChatJudge(chat_with(server)), cases))
    assert len(found) >= 20
    assert all(verdict.status == "judged" for _, verdict in found)
    assert 20 <= len(server.requests) < 60
