import json
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from stores import rows

from longvlm.jobs.answer import run as answer
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.answer.terms import failed_answer
from longvlm.jobs.cli import main
from longvlm.pipeline.answering.questions import ask, read_questions
from longvlm.pipeline.models.families import describe_model
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from models import save_clip_tower
from support import ROOT


def questions(*rows):
    """Rows of (question_id, question, video) as a table; the later ones may be left out."""
    names = ("question_id", "question", "video")
    made = [{"type": "text", **dict(zip(names, row, strict=False))} for row in rows]
    return pa.Table.from_pylist(made, schema=tables.QUESTIONS)


def order_for(store, asked, **settings):
    return AnswerOrder(str(store), asked, precision="float32", **{"max_new_tokens": 6, **settings})


def counts(report, *names):
    return tuple(report.as_json()[name] for name in names)


@pytest.fixture
def quick(monkeypatch):
    """Answers without a model: for what is asked, counted and committed around them."""

    def stage(run, groups):
        terms = run.terms
        quick.asked.append(sum(map(len, groups["questions"].to_pylist())))
        for group in groups.to_pylist():
            error = TerminalError(ErrorCode.ANSWER_FAILED, "made up")
            made = [failed_answer(group, q, terms.recipe, terms.run_id, error) for q in group["questions"]]
            said = {"status": "answered", "answer": "yes", "error_code": None, "error": None}
            yield pa.Table.from_pylist([row | said for row in made], schema=tables.ANSWERS)

    quick = SimpleNamespace(stage=stage, asked=[])
    monkeypatch.setattr(answer._AnswerRun, "stage", stage)
    return quick


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return tmp_path / "store"


def test_every_selected_video_is_answered_what_cannot_be_is_a_row_and_the_run_tells_its_rates(store):
    asked = questions(("good", "What is red?"), ("bad", "Is <vid_patch> red?", "clip-03"))
    report = run_answer(order_for(store, asked, where="duration_s > 3.5"))
    names = ("videos", "asked", "answered", "failed", "unparsed", "reused", "not_attempted", "not_indexed")
    assert counts(report, *names) == (3, 4, 3, 1, 0, 0, 0, 0)
    answers = rows(store, "FROM answers WHERE status = 'answered'")
    (failed,) = rows(store, "FROM answers WHERE status = 'failed'")
    assert (failed["question_id"], failed["error_code"]) == ("bad", "answer_failed")
    assert sorted(row["answer"] for row in answers) == sorted(r["answer"] for r in report.rows() if r["answer"])
    assert all(row["num_visual_tokens"] and row["latency_ms"] > 0 for row in answers)
    (run,) = rows(store, "SELECT counts FROM runs WHERE job = 'answer'")
    measured = json.loads(run["counts"])
    assert measured["questions"] == 4
    assert min(measured[name] for name in ("prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "workers")) > 0


@pytest.mark.usefixtures("quick")
def test_what_is_answered_is_not_asked_again(store):
    asked = questions(("q1", "What is red?"), ("q2", "Why?", "clip-01"))
    run_answer(order_for(store, asked.slice(0, 1), where="duration_s < 1.5"))
    report = run_answer(order_for(store, asked))
    assert counts(report, "asked", "answered", "reused") == (13, 13, 3)
    assert len(rows(store, "FROM answers")) == len(list(report.rows())) == 13
    again = run_answer(order_for(store, asked))
    assert counts(again, "asked", "reused") == (13, 13)
    assert len(list(again.rows())) == 13
    reworded = run_answer(order_for(store, questions(("q1", "What is blue?")), limit=1))
    assert counts(reworded, "asked", "reused") == (1, 0)


def test_what_the_vocabulary_cannot_spell_is_refused_before_the_run_and_numbers_are_read(store, tmp_path):
    file = tmp_path / "q.jsonl"
    thing = {"question": "What is it?", "type": "json", "schema": {"type": "object", "required": ["colour"]}}
    file.write_text(json.dumps(thing) + "\n" + json.dumps({"question": "How many?", "type": "number"}))
    asked = read_questions(str(file))
    args = ["answer", "--store", str(store), "--questions", str(file), "--ray-address", "none"]
    for more in ([], ["--dry-run"]):
        result = CliRunner().invoke(main, [*args, *more])
        assert result.exit_code == 2
        assert "cannot spell the answer of type json to 'What is it?' (it has no token for { } [ ]" in result.output
    assert rows(store, "FROM answers") == []
    report = run_answer(order_for(store, asked.slice(1), limit=2, ray_address="none"))
    assert counts(report, "answered", "unparsed", "failed") == (2, 0, 0)
    assert all(float(row["value"]) == float(row["answer"]) for row in report.rows())


def test_a_shard_that_is_gone_fails_its_own_questions(store):
    gone = min((store / "tokens").glob("*.parquet"))
    write_ids = set(pq.read_table(gone, columns=["write_id"])["write_id"].to_pylist())
    gone.unlink()
    report = run_answer(order_for(store, ask("What is red?")))
    assert counts(report, "failed", "answered") == (len(write_ids), 12 - len(write_ids))
    assert {row["write_id"] for row in report.rows() if row["status"] == "failed"} == write_ids
    assert "index.duckdb" in report.notes[0]


@pytest.mark.usefixtures("quick")
def test_a_model_that_asks_for_sampling_is_noted_once_a_run(store, model, tmp_path):
    asking = shutil.copytree(model, tmp_path / "asking")
    (asking / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7}')
    args = ["answer", "--store", str(store), "--model", str(asking), "--ask", "Why?", "--ask", "Who?"]
    done = CliRunner().invoke(main, [*args, "--ray-address", "none"])
    assert done.exit_code == 0, done.output
    assert done.output.count("asks for sampling (temperature 0.7), but answers are decoded greedily") == 1
    assert {row["decoding"] for row in rows(store, "FROM answers")} == {"greedy"}
    again = CliRunner().invoke(main, [*args, "--ray-address", "none"])
    assert "asks for sampling" not in again.output  # nothing was left to ask
    sampled = CliRunner().invoke(main, [*args, "--ray-address", "none", "--temperature", "0.7", "--json"])
    assert "asks for sampling" not in sampled.output
    found = {row["decoding"] for row in rows(store, "FROM answers")}
    assert found == {"greedy", "temperature 0.7, top_p 1.0, seed 0"}


def test_a_small_context_still_answers_with_what_it_holds(store, model, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(model, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 540}))
    report = run_answer(order_for(store, ask("What is red?"), model=str(small), max_new_tokens=16))
    assert counts(report, "answered", "failed") == (12, 0)
    assert {row["num_visual_tokens"] for row in report.rows()} <= set(range(6, 13))


def test_a_budget_caps_the_prefix_and_its_answers_stand_beside_the_others(store):
    report = run_answer(order_for(store, ask("What is red?"), budget=9, tokens_per_segment=3, focus="even"))
    assert counts(report, "answered", "reused") == (12, 0)
    assert 6 <= max(row["num_visual_tokens"] for row in report.rows()) <= 9
    report = run_answer(order_for(store, ask("What is red?"), budget=6))
    assert len(rows(store, "FROM answers")) == 24
    assert {row["error_code"] for row in report.rows() if row["status"] == "failed"} == {"budget_too_small"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"where": "colour = 1"}, "colour"),
        ({"where": "duration_s > 1000"}, "no indexed video is selected"),
        ({"questions": questions(("q", "What?", "nobody"))}, "name no indexed video"),
        ({"model": "other-tower"}, "tower"),
        ({"template": "chat"}, "no template chat; it has long_vlm_v1"),
        ({"budget": 5}, "raise --budget"),
        ({"budget": 100_000}, "lower --budget"),
        ({"max_new_tokens": 8000}, "lower --max-new-tokens"),
    ],
)
def test_wrong_input_is_a_sentence_and_writes_nothing(indexed, tmp_path, monkeypatch, settings, says):
    monkeypatch.chdir(tmp_path)
    if settings.get("model") == "other-tower":
        save_clip_tower(tmp_path / "other-tower" / "tower", seed=7)
        build_untrained(tmp_path / "other-tower", tower="tower", tower_dim=64)
    with pytest.raises(InputError, match=says):
        run_answer(replace(order_for(indexed, ask("What?")), **settings))
    assert not rows(indexed, "FROM ledger_answers")


@pytest.mark.usefixtures("quick")
def test_a_question_file_names_its_videos(store, tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "question": "What?", "video": f"clip-{i:02}"} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, lines)))
    report = run_answer(order_for(store, read_questions(str(file))))
    assert counts(report, "asked", "videos") == (3, 3)
    assert rows(store, "FROM answers WHERE question_id::INT <> uri[-6:-5]::INT") == []


def test_a_dry_run_asks_nothing_and_estimates_from_the_last_run(store):
    order = order_for(store, ask("What is red?"), dry_run=True)
    report = run_answer(order)
    assert counts(report, "videos", "asked", "not_attempted", "seconds") == (12, 12, 12, None)
    assert report.as_json()["decode_tokens"] == 12 * 6
    assert not rows(store, "FROM answers")
    run = run_answer(order_for(store, ask("What is red?"), limit=4))
    report = run_answer(order)
    assert counts(report, "reused", "not_attempted", "rates_of_run") == (4, 8, run.run_id)
    assert report.as_json()["seconds"] >= 0


def test_many_small_waves_lose_and_repeat_nothing(store, quick, monkeypatch):
    monkeypatch.setattr("longvlm.jobs.answer.plan.WAVE_QUESTIONS", 25)
    monkeypatch.setattr(answer, "COMMIT_ANSWERS", 7)
    asked = questions(*((f"q{i}", f"What is number {i}?") for i in range(5)))
    report = run_answer(order_for(store, asked))
    assert counts(report, "asked", "answered", "not_attempted") == (60, 60, 0)
    assert quick.asked == [25, 25, 10]
    assert rows(store, "SELECT count(*) AS n FROM ledger_answers") == [{"n": 60}]


def test_questions_lost_with_a_worker_are_asked_again_alone_and_then_fail_as_lost(store, quick, monkeypatch):
    def lossy(run, groups):
        is_first = not quick.asked
        for answers in quick.stage(run, groups):
            if "clip-00" not in answers["uri"][0].as_py() and not (is_first and "clip-01" in answers["uri"][0].as_py()):
                yield answers
                yield answers  # a worker that is run again says all of it again

    monkeypatch.setattr(answer._AnswerRun, "stage", lossy)
    report = run_answer(order_for(store, questions(("a", "What?"), ("b", "Who?"))))
    assert counts(report, "asked", "answered", "failed", "not_attempted") == (24, 22, 2, 0)
    assert quick.asked == [24, 4, 2]
    assert rows(store, "SELECT count(*) AS n FROM ledger_answers") == [{"n": 24}]
    assert {row["error_code"] for row in rows(store, "FROM answers WHERE status = 'failed'")} == {"lost"}


def test_an_interrupted_run_keeps_what_it_has_and_the_next_goes_on(store, quick, monkeypatch):
    def interrupted(run, groups):
        yield from islice(quick.stage(run, groups), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answer._AnswerRun, "stage", interrupted)
        report = run_answer(order_for(store, ask("What?")))
    assert (report.stopped, *counts(report, "answered", "not_attempted")) == ("interrupted", 5, 7)
    assert len(list(report.rows())) == 5
    assert counts(run_answer(order_for(store, ask("What?"))), "answered", "reused") == (12, 5)


@pytest.mark.usefixtures("quick")
def test_a_driver_that_is_killed_loses_and_repeats_no_answer(store, model, tmp_path):
    """It is killed once two answers are committed; the next run asks the rest. To describe a model takes it seconds."""
    (tmp_path / "spec").write_bytes(pickle.dumps(describe_model(model)))
    code = """
import os, pickle, signal, sys
from pathlib import Path
import pyarrow as pa
from longvlm.jobs import choose
from longvlm.jobs.answer import run as answer
from longvlm.jobs.answer.terms import begun_row
from longvlm.jobs.cluster.commits import Commits
from longvlm.pipeline.answering.questions import ask
from longvlm.schemas import tables
flush, committed = Commits.flush, []
def stage(run, groups):
    for group in groups.to_pylist():
        row = begun_row(group, group["questions"][0], run.terms.recipe, run.terms.run_id)
        yield pa.Table.from_pylist([row | {"status": "answered"}], schema=tables.ANSWERS)
def killed(commits):
    committed.extend(flush(commits))
    if len(committed) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return committed[-1:]
spec = pickle.loads(Path(sys.argv[2]).read_bytes())
choose.describe_model = lambda _: spec
answer._AnswerRun.stage = stage
answer.COMMIT_ANSWERS = 1
Commits.flush = killed
answer.run_answer(answer.AnswerOrder(sys.argv[1], ask("What is red?"), precision="float32", max_new_tokens=6))
"""
    command = [sys.executable, "-c", code, str(store), str(tmp_path / "spec")]
    driver = subprocess.run(command, cwd=ROOT, check=False, timeout=300)
    assert driver.returncode == -signal.SIGKILL
    assert rows(store, "SELECT count(*) AS n FROM answers") == [{"n": 2}]
    report = run_answer(order_for(store, ask("What is red?")))
    assert counts(report, "reused", "answered") == (2, 12)
    assert rows(store, "SELECT count(*) AS n FROM ledger_answers") == [{"n": 12}]
