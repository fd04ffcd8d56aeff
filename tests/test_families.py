"""The whole journey with today's families, small and random: index, answer, compare, train, keep house."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from journey import in_process  # noqa: F401 - a fixture

from clips import write_clip
from longvlm.jobs.cli import main
from models import save_qwen3_vl, save_smolvlm

FAMILIES = {"qwen3_vl": save_qwen3_vl, "smolvlm": save_smolvlm}


def run(*args, code=0):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result


def lines(result, kind):
    return [line for line in map(json.loads, result.stdout.splitlines()) if line.pop("kind", None) == kind]


@pytest.fixture(scope="module", params=list(FAMILIES))
def indexed(request, tmp_path_factory):
    """A model, videos of one to four seconds (one with an odd number of frames), and a store of them."""
    folder = tmp_path_factory.mktemp(request.param)
    model = FAMILIES[request.param](folder / "model")
    (folder / "videos").mkdir()
    for name, num_frames in (("one", 25), ("odd", 70), ("four", 100)):
        write_clip(folder / "videos" / f"{name}.mp4", num_frames, size=(96, 54))
    grid = {"patch_grid": [2, 3]} if request.param == "qwen3_vl" else {}
    settings = {"base": "tiny", "tokens_per_segment": 6, **grid}
    (folder / "recipe.json").write_text(json.dumps(settings))
    more = ("--model", model, "--recipe", folder / "recipe.json", "--json")
    done = run("index", folder / "videos", "--store", folder / "store", *more)
    assert json.loads(done.stdout.splitlines()[-1])["indexed"] == 3
    return folder


def answers_of(folder, *more):
    asked = ("--ask", "What is it?", "--max-new-tokens", 6, "--precision", "float32", "--json")
    return lines(run("answer", "--store", folder / "store", *asked, *more), "answer")


def test_answers_come_from_what_is_stored_with_evidence(indexed):
    first = answers_of(indexed, "--evidence")
    assert [row["status"] for row in first] == ["answered"] * 3
    assert all(row["evidence"] for row in first)
    again = run("answer", "--store", indexed / "store", "--ask", "What is it?", "--max-new-tokens", 6,
                "--precision", "float32", "--json")  # fmt: skip
    assert lines(again, "summary")[0]["reused"] == 3
    smaller = answers_of(indexed, "--tokens-per-segment", 2)
    assert all(few["num_visual_tokens"] < all_["num_visual_tokens"] for few, all_ in zip(smaller, first, strict=True))
    budget = min(row["num_visual_tokens"] for row in first) - 2
    assert all(
        row["num_visual_tokens"] <= budget + 100 for row in answers_of(indexed, "--budget", budget, "--focus", "even")
    )


@pytest.mark.parametrize("kind", ["bool", "number"])
def test_typed_answers(indexed, kind):
    rows = answers_of(indexed, "--type", kind)
    assert {row["status"] for row in rows} == {"answered"}
    assert all(row["value"] is not None for row in rows)


def test_places_are_stored_and_survive_house_keeping(indexed, tmp_path):
    store = shutil.copytree(indexed / "store", tmp_path / "store")
    rows = [row for path in (store / "tokens").glob("**/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert all(len(row["positions"]) == 24 * row["num_tokens"] for row in rows)
    before = answers_of(indexed)
    run("maintain", "--store", store, "--verify")
    run("forget", "--store", store, "--uri", indexed / "videos" / "one.mp4", "--yes")
    asked = ("--ask", "What is it?", "--max-new-tokens", 6, "--precision", "float32", "--seed", 1, "--json")
    after = lines(run("answer", "--store", store, *asked), "answer")
    kept = {row["video"]: row["answer"] for row in before if "one.mp4" not in row["video"]}
    assert {row["video"]: row["answer"] for row in after} == kept


def test_what_needs_a_text_encoder_says_so(indexed):
    focus = run("answer", "--store", indexed / "store", "--ask", "What?", "--focus", "question", "--budget", 20, code=2)
    assert "has no text encoder; use --focus even" in focus.output
    rows = answers_of(indexed, "--focus", "auto", "--budget", 40)
    assert {row["focus"] for row in rows} - {None} == {"even"}  # no time is named; a short video is held
    assert "has no text encoder" in run("search", "--store", indexed / "store", "a box", code=2).output


def test_nothing_merged_is_what_transformers_answers_over_the_frames(indexed, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is it?"}\n{"question": "Red?", "type": "bool"}\n')
    settings = ("--model", indexed / "model", "--questions", tmp_path / "q.jsonl", "--recipe", indexed / "recipe.json")
    more = ("--max-new-tokens", 6, "--budgets", 40, "--out", tmp_path / "out", "--json")
    figures = {row["path"]: row for row in lines(run("compare", indexed / "videos", *settings, *more), "path")}
    assert list(figures) == ["baseline", "unmerged", "full", "budget-40"]
    assert figures["unmerged"]["agreement"] == 1.0


def test_a_low_rank_adapter_learns_from_stored_tokens(indexed, tmp_path):
    rows = [{"video_id": name, "q": "What is it?", "a": "a box"} for name in ("one", "odd", "four")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {"base": "lora", "precision": "float32", "batch_videos": 3, "max_steps": 2, "max_length": 4096}
    (tmp_path / "lora.json").write_text(json.dumps(recipe | {"lora_targets": ["q_proj", "v_proj"]}))
    data = ("--store", indexed / "store", "--model", indexed / "model", "--data", tmp_path / "train.jsonl")
    run("train", *data, "--recipe", tmp_path / "lora.json", "--to", tmp_path / "to")
    asked = ("--ask", "What is it?", "--max-new-tokens", 2, "--model", tmp_path / "to", "--json")
    assert len(lines(run("answer", "--store", indexed / "store", *asked), "answer")) == 3
    refused = run("train", *data, "--recipe", "projector", "--to", tmp_path / "other", code=2)
    assert "no projector to train or to whiten for; train with the stage lora or full" in refused.output
