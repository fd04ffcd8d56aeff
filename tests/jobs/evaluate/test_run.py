import csv
import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from stores import rows

from judge_server import LIKES, JudgeServer
from longvlm.jobs.cli import main
from longvlm.jobs.evaluate import run as evaluate
from longvlm.jobs.evaluate import verdicts
from longvlm.jobs.evaluate.run import EvaluateOrder, JudgeOrder, run_evaluate
from longvlm.pipeline.judging import judge_http
from longvlm.schemas.errors import InputError


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge_http, "_FIRST_PAUSE_S", 0.01)
    made = JudgeServer(lambda *_: "{'score': 3}")
    yield made
    made.stop()


def write_labels(path):
    """Yes and no to every clip and a name for every second, of one video more than there are."""
    made = []
    for i in range(13):
        made.append({"video": f"clip-{i:02}", "question": "Red?", "answer": ["yes", "no"][i % 2], "type": "bool"})
        if i % 2:
            made.append({"video": f"clip-{i:02}", "question": "What?", "answer": "dog", "question_id": f"1.{i}"})
    path.write_text("\n".join(map(json.dumps, made)))
    return str(path)


@pytest.fixture
def labels(tmp_path):
    return write_labels(tmp_path / "labels.jsonl")


@pytest.fixture(scope="module")
def asked(tmp_path_factory, indexed):
    """A store with an answer to every label, judged by comparing."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copytree(indexed, folder / "store")
    report = run_evaluate(order(folder / "store", labels=write_labels(folder / "labels.jsonl")))
    assert report.as_json()["num_judged"] == 18
    return folder / "store"


@pytest.fixture
def answered(tmp_path, asked):
    """A store with an answer to every label, and no verdict."""
    shutil.copytree(asked, tmp_path / "answered")
    shutil.rmtree(tmp_path / "answered" / "verdicts")
    return tmp_path / "answered"


@pytest.fixture
def paired(tmp_path):
    path = tmp_path / "consistency.json"
    made = [{"video_name": f"clip-{i:02}", "Q1": "What is it?", "Q2": "Which?", "A": "a dog"} for i in range(4)]
    path.write_text(json.dumps(made))
    return str(path)


def order(store, **settings):
    return EvaluateOrder(str(store), max_new_tokens=3, **settings)


def by_http(server):
    return JudgeOrder(server.url, "j")


def test_labels_are_scored_by_question_and_asked_once(answered, labels):
    report = run_evaluate(order(answered, labels=labels))
    told = report.as_json()
    assert (told["num_questions"], told["num_judged"], told["missing"]) == (19, 18, {"not_in_store": 1})
    red, what = told["by_question"]
    assert (red["num_questions"], red["num_judged"], what["num_judged"]) == (13, 12, 6)
    assert sum(one["support"] for one in red["classes"].values()) == 12
    given = {row["uri"]: row["value"] for row in rows(answered, "SELECT uri, value FROM answers WHERE type = 'bool'")}
    right = sum(value == ["true", "false"][int(uri[-6:-4]) % 2] for uri, value in given.items())
    assert red["accuracy"] == right / 12
    assert (what["accuracy"], told["precision"]) == (0.0, red["precision"] / 2)
    again = run_evaluate(order(answered, labels=labels)).as_json()
    assert (again["verdicts_new"], again["verdicts_reused"], again["accuracy"]) == (0, 18, told["accuracy"])
    assert rows(answered, "SELECT count(*) AS n FROM ledger_verdicts") == [{"n": 18}]
    assert rows(answered, "SELECT count(*) AS n FROM ledger_answers") == [{"n": 18}]
    runs = rows(answered, "SELECT counts FROM runs WHERE job = 'evaluate'")
    assert [json.loads(row["counts"])["accuracy"] for row in runs] == [told["accuracy"]] * 3  # one of the fixture's


def test_paired_questions_are_both_asked_and_judged_together(store, paired, server):
    asked = order(store, benchmark="videochatgpt-consistency", questions=paired, judge=by_http(server))
    told = run_evaluate(asked).as_json()
    assert (told["num_questions"], told["num_judged"], told["score"]) == (4, 4, 3.0)
    assert told["as_reference"] == {"score": 3.0}
    assert len(rows(store, "FROM answers")) == 8
    assert len(rows(store, "FROM verdicts WHERE prediction2 IS NOT NULL")) == 4


def test_qa_files_as_published_with_an_answer_file(store, tmp_path, server):
    questions, answers = tmp_path / "test_q.json", tmp_path / "test_a.json"
    asked = [{"video_name": f"clip-{i:02}", "question": "what", "question_id": f"x_{i}.0"} for i in range(3)]
    questions.write_text(json.dumps(asked))
    answers.write_text(json.dumps([{"question_id": f"x_{i}.0", "answer": "dog", "type": i % 2} for i in range(3)]))
    files = {"benchmark": "activitynet-qa", "questions": str(questions), "answers": str(answers)}
    exact = run_evaluate(order(store, **files)).as_json()
    assert (exact["judge"], exact["accuracy"], exact["score"], exact["as_reference"]) == ("exact#1", 0.0, None, None)
    server.say = lambda *_: LIKES
    told = run_evaluate(order(store, **files, judge=by_http(server))).as_json()
    assert (told["accuracy"], told["score"], told["by_kind"]) == (1.0, 4.0, {"0": 1.0, "1": 1.0})
    assert told["num_by_kind"] == {"0": 2, "1": 1}
    assert [row["judge"] for row in rows(store, "FROM scores ORDER BY judge")] == ["exact#1", told["judge"]]


def test_a_judge_that_is_out_of_reach_stops_the_run_and_the_next_goes_on(answered, server, labels, monkeypatch):
    monkeypatch.setattr(judge_http, "CONCURRENCY", 1)
    monkeypatch.setattr(evaluate, "_MOST_OUT_OF_REACH", 2)
    server.say = lambda _, number: LIKES if number < 2 else (503, {}, "down")
    report = run_evaluate(order(answered, labels=labels, judge=by_http(server)))
    assert "503: down" in report.stopped
    told = report.as_json()
    assert told["missing"]["failed"] >= 2
    assert sum(told["missing"].values()) + told["num_judged"] == 19
    server.say = lambda *_: LIKES
    again = run_evaluate(order(answered, labels=labels, judge=by_http(server)))
    assert again.stopped is None
    assert (again.as_json()["num_judged"], again.num_reused > 0) == (18, True)
    assert len(rows(answered, "FROM verdicts")) == 18


def test_ctrl_c_keeps_what_is_judged(answered, server, labels, monkeypatch):
    def interrupted(row):
        calls.append(row)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return False

    calls = []
    server.say = lambda *_: LIKES
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "is_judge_unreachable", interrupted)
        report = run_evaluate(order(answered, labels=labels, judge=by_http(server)))
    assert report.stopped == "interrupted"
    assert 0 < len(rows(answered, "FROM verdicts")) <= 18
    assert run_evaluate(order(answered, labels=labels, judge=by_http(server))).as_json()["num_judged"] == 18


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "name either a benchmark"),
        ({"benchmark": "msvd-qa", "labels": "FILE"}, "name either a benchmark"),
        ({"labels": "FILE", "answers": "FILE"}, "go with --benchmark"),
        ({"benchmark": "msvd"}, "there is no benchmark msvd; name one of videochatgpt-correctness"),
        ({"benchmark": "msvd-qa"}, "needs its question file"),
        ({"benchmark": "videochatgpt-detail", "questions": "FILE"}, "need a model as judge"),
        ({"labels": "FILE", "judge": JudgeOrder(url="http://h/v1")}, "needs the name of its model"),
        ({"labels": "FILE", "judge": JudgeOrder(model="m", key_variable="K")}, "--judge-key-env goes with --judge-url"),
        ({"labels": "FILE", "judge": JudgeOrder(model="/no/judge")}, "/no/judge does not exist"),
        ({"labels": "/no/file.csv"}, "the label file /no/file.csv does not exist"),
        ({"labels": "FILE", "store": "/no/store"}, "there is no store at /no/store"),
        ({"labels": "FILE", "model": "/no/model"}, "/no/model does not exist"),
        ({"labels": "STRANGERS"}, "not one of the videos that .* names is in the store"),
    ],
)
def test_wrong_orders_are_a_sentence_and_nothing_is_written(indexed, labels, tmp_path, settings, says):
    strangers = tmp_path / "strangers.csv"
    with strangers.open("w") as file:
        csv.writer(file).writerows([("video", "question", "answer"), ("nobody", "What?", "x")])
    files = {"FILE": labels, "STRANGERS": str(strangers)}
    settings = {name: files.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(InputError, match=says):
        run_evaluate(replace(order(indexed), **settings))
    assert not rows(indexed, "FROM ledger_answers")
    assert not rows(indexed, "FROM ledger_verdicts")


def test_the_command_ends_with_one_object_and_leaves_a_report(answered, labels, tmp_path):
    command = ["evaluate", "--store", str(answered), "--labels", labels, "--max-new-tokens", "3"]
    shown = CliRunner().invoke(main, [*command, "--report", str(tmp_path / "report"), "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout.splitlines()[-1])
    assert {"accuracy", "by_kind", "num_questions", "num_missing"} <= set(told)
    assert "questions about videos that the store does not know: 1;" in shown.stderr
    assert (tmp_path / "report" / "report.md").is_file()
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    plain = CliRunner().invoke(main, command)
    assert "1 of 19 (5.3 %) are missing: not in store 1" in plain.stdout
    query = plain.stdout.split("longvlm sql --store S ")[1].split('"')[1]
    assert [row["num_judged"] for row in rows(answered, query)] == [18]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--labels", "x.csv"], "name the store"),
        (["--store", "s", "--benchmark", "msvd-qa", "--seed", "1"], "of --benchmark tinyworld"),
        (["--store", "s3://k:secret@b/s", "--labels", "x.csv"], "holds a password"),
    ],
)
def test_wrong_options_end_with_exit_code_2(options, says):
    shown = CliRunner().invoke(main, ["evaluate", *options])
    assert (shown.exit_code, says in shown.stderr) == (2, True)


def test_rows_that_were_kept_do_not_count_twice_after_a_commit_of_each(answered, server, labels, monkeypatch):
    monkeypatch.setattr(verdicts, "COMMIT_VERDICTS", 1)
    server.say = lambda *_: LIKES
    for _ in range(2):
        told = run_evaluate(order(answered, labels=labels, judge=by_http(server))).as_json()
        assert (told["num_judged"], told["accuracy"]) == (18, 1.0)
    assert rows(answered, "SELECT count(*) AS n FROM ledger_verdicts") == [{"n": 18}]
    assert len(server.requests) <= 18
