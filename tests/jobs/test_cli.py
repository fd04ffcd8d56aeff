"""The command line as people and machines use it, in processes of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from journey import ONE_CORE

from longvlm.jobs.cli import main
from longvlm.schemas.tables import QUESTION_TYPES

LONGVLM = [sys.executable, "-m", "longvlm"]


def run(*args):
    """A command in this process, on the shared Ray session."""
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def objects(result):
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return tmp_path / "store"


def test_answer_prints_an_object_an_answer_and_a_last_one(store):
    command = ("answer", "--store", store, "--ask", "What is red?", "--where", "uri LIKE '%clip-0%'")
    *answers, last = objects(run(*command, "--max-new-tokens", 3, "--json", "--evidence"))
    assert len(answers) == last["asked"] == last["answered"] == 10
    assert [answer.pop("kind") for answer in [*answers, last]] == ["answer"] * 10 + ["summary"]
    needed = {
        "question_id",
        "question",
        "video",
        "type",
        "answer",
        "value",
        "status",
        "num_visual_tokens",
        "focus",
        "kept_segments",
        "latency_ms",
    }
    assert all(needed <= set(answer) for answer in answers)
    assert all(sum(span["weight"] for span in answer["evidence"]) == pytest.approx(1) for answer in answers)
    shown = run(*command, "--max-new-tokens", 3, "--evidence").output
    assert "What is red?" in shown
    assert "%)" in shown
    assert "reused" in shown


def test_answers_have_the_type_that_was_asked_for(store):
    command = ("answer", "--store", store, "--limit", 2, "--json", "--ask", "What color is it?")
    *answers, last = objects(run(*command, "--type", "choice", "--choices", "red|green"))
    assert {answer["value"] for answer in answers} <= {"red", "green"}
    assert all(0.5 <= answer["confidence"] <= 1 for answer in answers)
    assert last["videos"] == 2
    yes_or_no = ("--ask", "Is it red?", "--ask", "Is it green?", "--type", "bool")
    *answers, last = objects(run("answer", "--store", store, "--limit", 2, "--json", *yes_or_no))
    assert {answer["question"] for answer in answers} == {"Is it red?", "Is it green?"}
    assert [type(answer["value"]) for answer in answers] == [bool] * 4
    (stored,) = objects(
        run(
            "sql",
            "--store",
            store,
            "--json",
            "SELECT DISTINCT type, typeof(value) AS t FROM answers WHERE type = 'bool'",
        )
    )
    assert stored == {"type": "bool", "t": "VARCHAR"}


def test_a_dry_run_is_one_object_and_asks_nothing(store):
    (counted,) = objects(run("answer", "--store", store, "--ask", "What?", "--dry-run", "--json"))
    expected = {"videos": 12, "asked": 12, "reused": 0, "decode_tokens": 12 * 256, "seconds": None}
    assert counted.items() >= expected.items()
    assert counted["prefill_tokens"] > 0
    assert "no run yet" in run("answer", "--store", store, "--ask", "What?", "--dry-run").output
    assert objects(run("sql", "--store", store, "FROM answers", "--json")) == []


def test_the_types_of_the_command_line_are_those_of_the_tables():
    (kind,) = [option for option in main.commands["answer"].params if option.name == "kind"]
    assert tuple(kind.type.choices) == QUESTION_TYPES


def test_sql_search_status_and_recipes_speak_json(store, clips):
    assert objects(run("sql", "--store", store, "SELECT count(*) AS n FROM videos", "--json")) == [{"n": 12}]
    *hits, scan = objects(run("search", "--store", store, "red, green, blue", "--limit", 3, "--json"))
    assert len(hits) == 3
    assert hits[0]["score"] >= hits[-1]["score"]
    assert [hit["kind"] for hit in [*hits, scan]] == ["moment"] * 3 + ["summary"]
    assert hits[0]["uri"].startswith(str(clips))
    assert all(hit["start_s"] <= hit["best_s"] < hit["end_s"] for hit in hits)
    assert scan["num_scanned"] > 18  # segments: each has several frames
    (status,) = objects(run("status", "--store", store, "--json"))
    assert status["videos"] == {"indexed": 12}
    assert status["segments"] == 18
    assert status["token_bytes"] > 0
    assert status["last_run"]["job"] == "index"
    (recipe,) = objects(run("recipe", "list", "--store", store, "--json"))
    assert (recipe["name"], recipe["active"]) == ("tiny", True)
    for command in (
        ("search", "--store", store, "red"),
        ("status", "--store", store),
        ("recipe", "list", "--store", store),
    ):
        assert run(*command).exit_code == 0


def test_a_person_sees_a_table_that_names_the_bottleneck(tmp_path, clips, model):
    shown = run("index", clips, "--store", tmp_path / "s", "--model", model, "--recipe", "tiny", "--include", "*-00*")
    assert "indexed" in shown.output
    assert "sets the pace" in shown.output


def test_a_run_that_mostly_failed_says_so_last_and_what_was_left_out(tmp_path, clips, model):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(clips / "clip-00.mp4", source)
    for name in ("a.mp4", "b\x1b[31m.mp4"):
        (source / name).write_bytes(b"no video" * 100)
    for name in ("a.srt", "b.srt", "c.jpg", "._a.mp4"):
        (source / name).write_bytes(b"\0")
    shown = run("index", source, "--store", tmp_path / "store", "--model", model, "--recipe", "tiny")
    assert shown.exit_code == 0
    assert "left out: 4 files (.srt 2, " in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("more than half of the videos failed by themselves: 2 of 3 (not_a_")
    assert "\\x1b[31m.mp4" in run("sql", "--store", tmp_path / "store", "--line", "FROM failures").stdout
    (told,) = objects(run("index", source, "--store", tmp_path / "store", "--retry-failed", "--json"))
    assert told["left_out"] == {".srt": 2, ".jpg": 1, "._*": 1}
    assert told["mostly_failed"].startswith("more than half of the videos failed by themselves: 2 of 2")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("index", "nowhere", "--store", "s", "--model", "m"), "nowhere"),
        (("answer", "--store", "nowhere", "--ask", "What?"), "no store at"),
        (("answer", "--store", "STORE"), "--ask"),
        (("answer", "--store", "STORE", "--where", "true", "--ask", "A?", "--where", "false"), "--where is given more"),
        (("recipe", "list", "--store", "STORE", "--store", "elsewhere"), "--store is given more than once"),
        (
            ("submit", "index", "a", "--store", "s", "--limit", 1, "--limit", 2, "--address", "http://h"),
            "--limit is given",
        ),
        (("answer", "--store", "STORE", "--questions", "missing.csv"), "does not exist"),
        (("answer", "--store", "STORE", "--questions", "wrong.csv"), "no column question"),
        (("answer", "--store", "STORE", "--questions", "wrong.csv", "--type", "bool"), "go with --ask"),
        (("answer", "--store", "STORE", "--ask", "What?", "--type", "choice"), "choices"),
        (("answer", "--store", "STORE", "--ask", "What?", "--template", "chat"), "no template chat"),
        (("answer", "--store", "STORE", "--ask", "What?", "--budget", 3), "raise --budget"),
        (("sql", "--store", "STORE", "DROP VIEW videos"), "one SELECT"),
        (("search", "--store", "STORE", "red", "--where", "nonsense ="), "syntax error"),
        (("recipe", "promote", "--store", "STORE", "other"), "tiny"),
        (("status", "--store", "nowhere"), "no store at"),
        (("status", "--store", "s3://KEY:SECRET@bucket/store"), "an address of s3:// holds a password"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(store, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("query\nWhat?\n")
    shown = run(*[str(store) if word == "STORE" else word for word in command], "--quiet")
    assert shown.exit_code == 2
    assert says in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1
    assert shown.stdout == ""


def test_ctrl_c_leaves_a_readable_store_and_a_rerun_goes_on(tmp_path, clips, model):
    source, store = tmp_path / "clips", tmp_path / "store"
    source.mkdir()
    for i in range(36):
        os.link(clips / f"clip-{i % 12:02}.mp4", source / f"{i:03}.mp4")
    command = [*LONGVLM, "index", str(source), "--store", str(store), "--model", model, "--recipe", "tiny", "--json"]
    env = {**os.environ, **ONE_CORE}  # a Ray of its own is what most people press Ctrl-C on
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(store.glob("tokens/*.parquet")) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=180)
    assert running.returncode == 1, err
    stopped = json.loads(out.splitlines()[-1])
    assert stopped["not_attempted"] > 0
    assert stopped["indexed"] + stopped["not_attempted"] == stopped["listed"] == 36
    (status,) = objects(run("status", "--store", store, "--json"))
    assert status["videos"].get("indexed", 0) == stopped["indexed"]
    (second,) = objects(run("index", source, "--store", store, "--json"))
    expected = {"listed": 36, "unchanged": stopped["indexed"], "indexed": stopped["not_attempted"], "not_attempted": 0}
    assert (
        second.items() >= {**expected, "failed": 0, "stale": 0, "deleted": 0, "failures": {}, "stopped": None}.items()
    )
    assert stopped["video_seconds"] + second["video_seconds"] == pytest.approx(3 * 30)
    assert {"wall_s", "run_id"} <= set(second)
