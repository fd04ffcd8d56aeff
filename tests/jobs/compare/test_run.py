"""Comparisons of small random models on real clips, in this process."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from clips import write_clip
from longvlm.jobs.cli import main
from longvlm.jobs.compare.run import CompareOrder, read_budgets, run_compare
from longvlm.pipeline.source.corpus import Source
from longvlm.schemas.errors import InputError
from models import LLAVAS, save_clip_tower, save_llava

ROWS = [
    {"question_id": "what", "question": "What happens?", "answer": "nothing"},
    {"question_id": "red", "question": "Is it red?", "type": "bool", "answer": "no"},
    {"question_id": "colour", "question": "Which?", "type": "choice", "choices": ["red", "green"], "answer": "Green"},
    {"question_id": "many", "question": "How many?", "type": "number"},
    {"question_id": "one", "question": "What is shown?", "video": "two-seconds"},
    {"question_id": "lost", "question": "What is shown?", "video": "elsewhere"},
]
BUDGETS = ("--budgets", "12, 6", "--budgets", "12")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Clips of two to four seconds, and a file that only calls itself one."""
    folder = tmp_path_factory.mktemp("source")
    for name, num_frames in (("two-seconds", 50), ("three-seconds", 75), ("four-seconds", 100)):
        write_clip(folder / f"{name}.mp4", num_frames)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    return {family: str(save_llava(tmp_path_factory.mktemp("llavas") / family, family)) for family in LLAVAS}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return str(file)


def compare(*args):
    return CliRunner().invoke(main, ["compare", *map(str, args)], catch_exceptions=False)


def compared(source, model, questions, out, *more, recipe="tiny"):
    """What the command prints for machines: answers, figures by path, and the summary."""
    settings = ("--recipe", recipe, "--max-new-tokens", 6, "--out", out, *BUDGETS, "--json")
    result = compare(source, "--model", model, "--questions", questions, *settings, *more)
    assert result.exit_code == 0, result.output
    *objects, summary = map(json.loads, result.stdout.splitlines())
    assert summary.pop("kind") == "summary"
    assert {line["kind"] for line in objects} == {"answer", "path"}
    return (
        [line for line in objects if line["kind"] == "answer"],
        {line["path"]: line for line in objects if line["kind"] == "path"},
        summary,
    )


@pytest.fixture(scope="module")
def comparison_of(source, llavas, questions, tmp_path_factory):
    """Gives what is `compared` with a family, once."""
    return cache(lambda family: compared(source, llavas[family], questions, tmp_path_factory.mktemp("out")))


def read(row):
    """What an answer says: its value, which is false for a No, or where it has none its text."""
    return row["answer"] if row["value"] is None else row["value"]


@pytest.mark.parametrize("family", LLAVAS)
def test_unmerged_tokens_answer_as_transformers_does_over_the_same_frames(comparison_of, family):
    answers, figures, summary = comparison_of(family)
    assert list(figures) == ["baseline", "unmerged", "full", "budget-12", "budget-6"]
    assert figures["unmerged"]["agreement"] == 1.0
    assert figures["unmerged"]["visual_tokens"] == figures["baseline"]["visual_tokens"]
    assert figures["unmerged"]["failed"] == 0
    confident = {
        path: [row["confidence"] for row in answers if row["path"] == path and row["type"] in ("bool", "choice")]
        for path in ("baseline", "unmerged")
    }
    assert confident["unmerged"] == pytest.approx(confident["baseline"], abs=1e-6)
    assert np.diff(np.sort(confident["baseline"][::2])).min() > 1e-5  # what is seen matters
    assert f"{LLAVAS[family][1].__name__} over 4 to 8 frames" in summary["baseline"]


def test_figures_follow_from_the_answers(comparison_of):
    answers, figures, summary = comparison_of("llava")
    given = {path: [row for row in answers if row["path"] == path] for path in figures}
    said = {(row["video"], row["question_id"]): read(row) for row in given["baseline"]}
    for path, rows in given.items():
        assert {(row["video"], row["question_id"]) for row in rows} == set(said)
        agrees = [read(row) == said[row["video"], row["question_id"]] for row in rows]
        assert [row["agrees"] for row in rows] == agrees
        assert figures[path]["agreement"] == pytest.approx(np.mean(agrees))
        right = {"what": "nothing", "red": False, "colour": "green"}
        known = [row for row in rows if row["question_id"] in right]
        verdicts = [read(row) == right[row["question_id"]] for row in known]
        assert figures[path]["accuracy"] == pytest.approx(np.mean(verdicts))
        assert figures[path]["visual_tokens"] == pytest.approx(np.mean([row["num_visual_tokens"] for row in rows]))
        assert figures[path]["questions"] == len(rows) == 3 * 4 + 1
        assert figures[path]["seconds_per_question"] > 0
        stored = list({row["video"]: row["stored_bytes"] for row in rows}.values())
        if path == "baseline":
            assert stored == [None] * 3
        else:
            assert figures[path]["stored_bytes_per_video"] == pytest.approx(np.mean(stored))
    assert figures["budget-6"]["visual_tokens"] == 6
    assert figures["budget-6"]["stored_bytes_per_video"] == 6 * (64 * 2 + 2 + 8)
    assert figures["budget-6"]["agreement"] < 1
    assert len(summary["videos"]) == 3
    assert [skipped["error_code"] for skipped in summary["skipped"]] == ["not_a_video"]
    assert summary.items() >= {"recipe": "tiny", "seed": 0, "questions_about_other_videos": 1}.items()


def test_stored_bytes_are_those_of_an_index(clips, model, indexed, tmp_path):
    file = tmp_path / "q.csv"
    file.write_text("question\nWhat?\n")
    _, figures, summary = compared(clips, model, str(file), tmp_path, "--sample", 12)
    blobs = " + ".join(f"octet_length({name})" for name in ("local", "sizes", "spans", "cls"))
    sql = CliRunner().invoke(main, ["sql", "--store", indexed, f"SELECT sum({blobs}) AS b FROM tokens", "--json"])
    assert figures["full"]["stored_bytes_per_video"] * 12 == int(json.loads(sql.stdout)["b"])
    assert list(figures) == ["baseline", "full", "budget-12", "budget-6"]
    assert figures["full"]["agreement"] == 1.0
    assert {row["accuracy"] for row in figures.values()} == {None}
    assert "does not know this model with its tower" in summary["baseline"]


def test_a_person_sees_a_table_and_what_was_skipped_and_gets_a_plot(source, llavas, questions, tmp_path):
    settings = ("--recipe", "tiny", "--max-new-tokens", 4, "--out", tmp_path / "new" / "folder")
    shown = compare(source, "--model", llavas["llava"], "--questions", questions, *settings)
    assert shown.exit_code == 0
    for text in (
        "transformers, over frames",
        "unmerged",
        "stored, in full",
        "budget 128",
        "accuracy",
        "100 %",
        "seed 0",
    ):
        assert text in shown.stdout
    assert "broken.mp4 (not_a_video)" in shown.stderr
    assert "1 questions name videos that the source lacks" in shown.stdout
    plot = tmp_path / "new" / "folder" / "compare.png"
    assert str(plot) in shown.stdout
    with Image.open(plot) as image:
        assert len(image.getcolors(1 << 20)) > 50


def test_where_the_context_is_short_fewer_frames_are_shown_and_stored_tokens_are_merged(source, questions, tmp_path):
    folder = save_llava(tmp_path / "short", "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 512 + 6 + 3 * 16 + 5  # a question, an answer, three frames
    (folder / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "fine.toml"
    recipe.write_text('base = "tiny"\ntokens_per_segment = 40\n')
    answers, figures, summary = compared(source, folder, questions, tmp_path, recipe=recipe)
    assert "over 3 frames" in summary["baseline"]
    assert {row["num_visual_tokens"] for row in answers if row["path"] == "baseline"} == {48}
    assert max(row["num_visual_tokens"] for row in answers if row["path"] == "full") == 53
    assert figures["unmerged"]["agreement"] == 1.0
    config["text_config"]["max_position_embeddings"] = 512 + 6 + 15
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not one frame fits the 533 tokens of context"):
        run_compare(CompareOrder(Source(str(source)), str(folder), questions, recipe="tiny", max_new_tokens=6))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sample": 0}, "use --sample 1 or more"),
        ({"model": "TOWER"}, "is only a vision tower"),
        ({"budgets": (100_000,)}, "a budget of 100000 .* do not fit"),
        ({"questions": "missing.csv"}, "does not exist"),
        ({"recipe": "missing"}, "there is no recipe missing"),
        (
            {"source": Source("SOURCE", include=("broken*",))},
            "not one video of the sample can be watched: .*not_a_video",
        ),
        ({"questions": "ELSEWHERE"}, "none of the questions is about a video of the source"),
        ({"questions": "WRONG"}, "row 1 .* is of type bool"),
        ({"recipe": "OTHER"}, "leave feature_layer and num_global_layers out"),
    ],
)
def test_wrong_input_is_a_sentence(source, llavas, questions, tmp_path, changes, says):
    files = {
        "ELSEWHERE": "question,video\nWhat?,nowhere\n",
        "WRONG": "question,type,answer\nRed?,bool,perhaps\n",
        "OTHER": 'base = "tiny"\nfeature_layer = -3\n',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.{'toml' if name == 'OTHER' else 'csv'}").write_text(text)
    if changes.get("model") == "TOWER":
        changes = {"model": str(save_clip_tower(tmp_path / "tower"))}
    for name in ("questions", "recipe"):
        if changes.get(name) in files:
            changes = {name: str(next(tmp_path.glob(f"{changes[name]}.*")))}
    if "source" in changes:
        changes = {"source": replace(changes["source"], uri=str(source))}
    order = CompareOrder(Source(str(source)), llavas["llava"], questions, recipe="tiny", max_new_tokens=4)
    with pytest.raises(InputError, match=says):
        run_compare(replace(order, **changes))


@pytest.mark.parametrize("text", ["", "many", "12,,6", "0", "-3", "1e3"])
def test_budgets_that_are_no_numbers_are_refused(text):
    with pytest.raises(InputError, match="are not numbers of visual tokens"):
        read_budgets(text)


def test_wrong_options_end_with_one_sentence_and_exit_code_2(source, llavas, questions, tmp_path):
    (tmp_path / "file").touch()
    usual = (source, "--model", llavas["llava"], "--questions", questions)
    for more, out, says in (
        (("--budgets", "many"), tmp_path, "the budgets 'many' are not numbers"),
        (("--sample", 0), tmp_path, "use --sample 1 or more"),
        ((), tmp_path / "file", "use another --out"),
    ):
        shown = compare(*usual, "--out", out, *more, "--quiet")
        assert shown.exit_code == 2
        assert says in shown.stderr
        assert (len(shown.stderr.splitlines()), shown.stdout) == (1, "")


def test_videos_are_decoded_once_and_scratch_is_gone(source, llavas, questions, tmp_path, monkeypatch):
    from longvlm.pipeline.decode.isolate import Decoder

    probed, probe = [], Decoder.probe

    def noted(self, path, *rest, **options):
        probed.append(path)
        return probe(self, path, *rest, **options)

    monkeypatch.setattr(Decoder, "probe", noted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    run_compare(CompareOrder(Source(str(source)), llavas["llava"], questions, recipe="tiny", max_new_tokens=2))
    assert len(probed) == len(set(probed)) == 4
    assert not list(tmp_path.glob("longvlm-*/*"))
