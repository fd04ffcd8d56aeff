import json
import multiprocessing
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import decode, section
from benchmarks.gpu.__main__ import FIGURES, SECTIONS, summary
from benchmarks.gpu.section import Run, SectionResult, check, run_section
from support import ROOT

# What the machine that it is meant for lacks; but for httpx2, which transformers here cannot do without.
ABSENT = (
    "av",
    "boto3",
    "click",
    "deltalake",
    "duckdb",
    "jsonschema",
    "llguidance",
    "moto",
    "ray",
    "rich",
    "s3fs",
)
HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda _, name, *rest: None if name.partition(".")[0] in {ABSENT} else find(name, *rest)
)
"""


def start(*arguments, environment=None):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **(environment or {})}
    )


def last_line(done):
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def bare(tmp_path):
    """An environment in which what may be missing is."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = {"PYTHONPATH": str(tmp_path)}
    probe = f"from importlib.util import find_spec as f; assert f('torch') and not any(map(f, {ABSENT}))"
    subprocess.run([sys.executable, "-c", probe], check=True, env={**os.environ, **environment})
    return environment


def test_the_rehearsal_runs_every_section_with_the_little_there_is(bare, tmp_path):
    out = tmp_path / "out"
    done = start("--device", "cpu", "--tiny", "--out", out, environment=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_line(done)
    assert result["sections"] == dict.fromkeys(SECTIONS, "ok")
    assert result["device"] == "cpu"
    assert set(result) == {"device", "sections", *FIGURES}
    assert None not in result.values()
    files = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(files) == set(SECTIONS)
    assert files["right"]["passed"] > 0 == files["right"]["failed"]
    assert files["memory"]["full"]["refusals"] > 0
    assert files["answer"]["engine_4x8"]["questions_per_s"] == result["answer_questions_per_s"]
    assert "error" not in files["train"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        pytest.param(
            [], "torch sees no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it sees one")
        ),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments, sentence):
    done = start(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_time_there_is_a_last_line_all_the_same(tmp_path):
    done = start("--device", "cpu", "--tiny", "--minutes", "0.001", "--out", tmp_path, "--only", "train")
    assert done.returncode == 1
    assert last_line(done)["sections"] == dict.fromkeys(["facts", "train"], "there was no time left for it.")
    assert last_line(done)["right_max_error"] is None
    assert "no time" in json.loads((tmp_path / "train.json").read_text())["error"]


def hang(run):
    run.note(before=1)
    time.sleep(60)


def die(run):
    run.note(before=float("nan"))
    os._exit(3)


def fail(run):
    os.write(1, b"what it was about")
    run.part("first", lambda: check(is_so=False, sentence="this is wrong."))
    run.part("second", lambda: {"figure": 2})
    run.say("a line")


def refuse(run):
    raise torch.OutOfMemoryError(f"none left on {run.device}")


@pytest.fixture
def outcome(monkeypatch):
    def outcome(function, share_s=60.0):
        monkeypatch.setitem(sys.modules, "benchmarks.gpu.made_up", SimpleNamespace(run=function))
        heard = []
        context = multiprocessing.get_context("fork")
        done = run_section(context, "made_up", "cpu", share_s, is_tiny=True, on_news=lambda _, line: heard.append(line))
        return done, heard

    return outcome


def test_a_section_that_hangs_is_ended_and_what_it_found_is_kept(outcome):
    done, _ = outcome(hang, share_s=1.0)
    assert "ended when its share of the time was over" in done.error
    assert done.as_json()["before"] == 1


def test_a_section_that_dies_says_how(outcome):
    done, _ = outcome(die)
    assert "exit code 3" in done.error
    assert done.found == {"before": None}


def test_a_part_that_fails_leaves_the_others_alone(outcome):
    done, heard = outcome(fail)
    assert done.error == "first: this is wrong."
    assert done.found == {"second": {"figure": 2}}
    assert [line for line in heard if line] == ["first: this is wrong.", "a line"]
    assert "what it was about" in done.log


def test_an_error_is_a_sentence(outcome):
    done, _ = outcome(refuse)
    assert done.error == "OutOfMemoryError: none left on cpu."
    assert section.describe(AssertionError("so it is.")) == "so it is."


def test_without_pyav_the_section_of_decoding_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(decode, "find_spec", lambda _: None)
    decode.run(Run(torch.device("cpu"), is_tiny=True, ends_s=time.monotonic() + 60, send=said.append))
    assert said == [("found", {"skipped": decode.MISSING}), ("line", decode.MISSING)]


def test_frames_are_held_against_the_cpus_where_there_is_pyav():
    context, heard = multiprocessing.get_context("fork"), []
    done = run_section(context, "decode", "cpu", 120, is_tiny=True, on_news=lambda _, line: heard.append(line))
    assert done.error is None
    clips = {name: clip for name, clip in done.found.items() if isinstance(clip, dict)}
    assert {name.partition("-")[0] for name in clips} == {"h264", "hevc", "vp9", "av1"}
    assert {clip["different"] for clip in clips.values()} == {0}
    assert all(clip["cpu_because"] for name, clip in clips.items() if name.startswith("av1"))


def test_the_last_line_says_what_did_not_run():
    found = summary(
        [SectionResult("facts", {"device": "H"}), SectionResult("answer", {"bool_per_s": 9.0}, "it broke.")]
    )
    assert found["sections"] == {"facts": "ok", "answer": "it broke."}
    assert (found["device"], found["answer_bool_per_s"], found["right_max_error"]) == ("H", 9.0, None)
