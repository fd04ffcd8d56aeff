"""Forms that write: a person's verdicts, and answers to what is asked. Forged ones, of which none writes anything."""

import asyncio
import re
import time
from dataclasses import replace
from urllib.parse import urlencode

import pytest
import stores
from servers import SCRIPT, SCRIPT_NAME
from starlette.requests import Request

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve import guard
from longvlm.jobs.serve.verdicts import name_of
from longvlm.schemas.errors import InputError

OF_IT = "FROM verdicts WHERE model = 'other/model'"
FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def form_token(server):
    return re.search(r'name="form_token" value="([^"]+)"', server.ask("/questions?question=h1")[2].decode())[1]


@pytest.fixture(scope="module")
def judged(shown, form_token):
    """The fields of a form that says yes to an answer."""
    (answer,) = stores.rows(str(shown / "store"), "FROM answers WHERE model = 'other/model'")
    names = ("write_id", "question_id", "question_hash", "answer_recipe")
    return {**{name: answer[name] for name in names}, "is_right": "yes", "form_token": form_token}


def post(server, target, fields, headers=None):
    body = urlencode(fields).encode()
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Content-Type": FORM, "Content-Length": str(len(body))}
    return server.ask(target, "POST", own | (headers or {}), body)


FORGED = {
    "no origin": (403, {}, {"Origin": None}),
    "a secret origin": (403, {}, {"Origin": "null"}),
    "another site": (403, {}, {"Origin": "http://evil.example"}),
    "another port of this machine": (403, {}, {"Origin": "http://127.0.0.1:1"}),
    "a page that says so itself": (403, {}, {"Sec-Fetch-Site": "cross-site"}),
    "a page of another port": (403, {}, {"Sec-Fetch-Site": "same-site"}),
    "another host": (421, {}, {"Host": "evil.example"}),
    "no token": (400, {"form_token": ""}, {}),
    "a wrong token": (400, {"form_token": "x" * 43}, {}),
    "no words": (400, {"form_token": b"\xff"}, {}),
    "JSON": (413, {}, {"Content-Type": "application/json"}),
    "a file": (413, {}, {"Content-Type": "multipart/form-data; boundary=x"}),
    "no type": (413, {}, {"Content-Type": None}),
    "too long": (413, {}, {"Content-Length": str(guard.MAX_BODY_BYTES + 1)}),
    "a length that is none": (400, {}, {"Content-Length": "-5"}),
    "in pieces": (413, {}, {"Transfer-Encoding": "chunked", "Content-Length": None}),
    "too many fields": (400, {f"f{number}": "x" for number in range(99)}, {}),
    "an answer that is not there": (400, {"question_id": "none"}, {}),
    "a video that is not there": (400, {"write_id": "00000000-0000-0000-0000-000000000000"}, {}),
    "SQL": (400, {"write_id": "' OR true --"}, {}),
    "a script": (400, {"answer_recipe": SCRIPT}, {}),
    "neither yes nor no": (400, {"is_right": "perhaps"}, {}),
    "half of it": (400, {"is_right": None}, {}),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_form_writes_nothing(server, shown, judged, forged):
    wanted, fields, headers = FORGED[forged]
    fields = {name: value for name, value in {**judged, **fields}.items() if value is not None}
    before = sorted((shown / "store").rglob("*.parquet"))
    status, _, data = post(server, "/verdict", fields, headers)
    assert status == wanted, data
    assert b"<script>" not in data
    assert sorted((shown / "store").rglob("*.parquet")) == before


def test_a_form_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "SERVE", replace(SERVE, head_s=0.05))
    request = Request({"type": "http", "method": "POST", "headers": []}, asyncio.Event().wait)
    with pytest.raises(InputError, match="did not arrive"):
        asyncio.run(guard.read_form(request, "x"))


def test_other_addresses_take_no_forms(server, judged):
    for target, wanted in (("/", 405), ("/sql", 405), ("/questions", 405), ("/static/app.css", 405), ("/nowhere", 404)):
        assert post(server, target, judged)[0] == wanted
    assert server.ask("/verdict")[0] == 405


def test_a_verdict_is_kept_and_the_newest_counts(server, shown, judged):
    store = str(shown / "store")
    back = f"/video/{judged['write_id']}?question=h1#answers"
    status, headers, _ = post(server, "/verdict", {**judged, "back": back})
    assert (status, headers["Location"]) == (303, back)
    (row,) = stores.rows(store, OF_IT)
    assert (row["judge"], row["is_right"], row["prediction"], row["benchmark"]) == ("human:anna", True, "No", "human")
    assert re.search(r'value="yes" aria-pressed="true"', server.ask(back.partition("#")[0])[2].decode())
    for evil in ("//evil.example", "http://evil.example", "/video/x\r\nSet-Cookie: a=b", "/\\evil.example"):
        assert post(server, "/verdict", {**judged, "is_right": "no", "back": evil})[1]["Location"] == "/questions"
    (row,) = stores.rows(store, OF_IT)
    assert row["is_right"] is False
    html = server.ask("/questions?question=h1&value=false")[2].decode()
    assert re.search(r'value="no" aria-pressed="true"', html)
    assert 'value="yes" aria-pressed="true"' not in html
    (score,) = stores.rows(store, "FROM scores WHERE model = 'other/model'")
    assert (score["accuracy"], score["judge"]) == (0.0, "human:anna")


def test_without_the_option_nobody_judges_and_what_was_said_is_shown(impatient, server, judged):
    post(server, "/verdict", judged)
    for _ in range(100):  # until it has looked at the store again
        html = impatient.ask("/questions?question=h1")[2].decode()
        if "anna says right" in html:
            break
        time.sleep(0.1)
    assert "anna says right" in html
    assert "data-thumbs" not in html
    assert post(impatient, "/verdict", judged)[0] == 405
    assert impatient.ask("/ask")[0] == 404


# --- questions ---


def test_a_question_to_a_video_is_answered_from_its_tokens_and_kept(server, shown, videos_by_name, form_token):
    store, write_id = str(shown / "store"), videos_by_name[SCRIPT_NAME]["write_id"]
    asked = {"ask": "is there a ring or a cross?", "kind": "bool", "form_token": form_token}
    for _ in range(2):  # the second time it is in the store already
        status, headers, _ = post(server, f"/video/{write_id}/ask", asked)
        assert status == 303
        (row,) = stores.rows(store, f"FROM answers WHERE question = '{asked['ask']}'")
        assert headers["Location"] == f"/video/{write_id}?question={row['question_hash']}#answers"
    assert row["value"] in ("true", "false")
    (run,) = stores.rows(store, f"FROM runs WHERE run_id = '{row['run_id']}'")
    assert run["job"] == "answer"
    html = server.ask(headers["Location"].partition("#")[0])[2].decode()
    assert f">{asked['ask']}</a>" in html.partition("</tr>")[2].partition("</tr>")[0]  # in the first row
    assert 'class="evidence on" data-answer="0"' in html


def test_a_question_to_some_is_shown_and_not_kept(server, shown, videos_by_name):
    words = urlencode({"ask": "what color is the first object?", "kind": "choice", "choices": "red | green | blue"})
    html = server.ask(f"/ask?q=tiny&{words}")[2].decode()
    assert "2 answers in " in html
    assert len(re.findall(r'<td class="said">\s*(?:red|green|blue)\s*</td>', html)) == 2
    video = server.ask(f"/video/{videos_by_name['tiny-3-00001']['write_id']}?{words}")[2].decode()
    assert re.search(r'<td class="said">\s*(?:red|green|blue)\b', video)
    assert stores.rows(str(shown / "store"), "FROM answers WHERE question LIKE 'what color%'") == []
    found = server.ask(f"/ask?search=a+ring&where=duration_s+%3E+1000&{words}")
    assert (found[0], b"no indexed video among these" in found[2]) == (400, True)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"ask": "x" * 3000}, "ask it in 2,000 characters"),
        ({"ask": "which?", "kind": "choice", "choices": "one"}, "at least two choices"),
        ({"ask": "which?", "kind": "riddle"}, "of the kinds text, bool"),
        ({"ask": "why?", "q": "no such name"}, "no indexed video among these"),
        ({"ask": "why?", "where": "1 ="}, "cannot run"),
        ({"ask": SCRIPT, "kind": SCRIPT}, "of the kinds text, bool"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(server, asked, sentence):
    status, _, data = server.ask(f"/ask?{urlencode(asked)}")
    assert (status, sentence in data.decode()) == (400, True)
    assert b"<script>alert" not in data


def test_a_person_has_a_name(monkeypatch):
    assert name_of("anna") == "anna"
    monkeypatch.setenv("LOGNAME", "somebody")
    assert name_of("") == "somebody"
    for wrong in ("a b", "<b>", "x" * 65, "a\n"):
        with pytest.raises(InputError, match="cannot stand in a verdict"):
            name_of(wrong)
