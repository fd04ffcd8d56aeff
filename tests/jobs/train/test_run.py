import json
import math
import os
import shutil
from contextlib import chdir
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from stores import rows

from longvlm import tinyworld
from longvlm.jobs.answer.run import AnswerOrder, run_answer
from longvlm.jobs.cli import main
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.train.context import InProcessContext
from longvlm.jobs.train.loop import RunLog, run_loop
from longvlm.jobs.train.plan import plan_training
from longvlm.jobs.train.read import Reader, example_from_row
from longvlm.jobs.train.run import TrainOrder, newest_checkpoint, run_train
from longvlm.jobs.train.worker_config import CHECKPOINTS, LOSSES, ReaderConfig, num_steps_done
from longvlm.pipeline.answering.questions import ask
from longvlm.pipeline.models.families import sight_of
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.training.card import CARD
from longvlm.pipeline.training.conversations import read_conversations
from longvlm.pipeline.training.finetune import finetune
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import full, projector

RECIPE = replace(
    full(), precision="float32", gradient_checkpointing=False, learning_rate=3e-3, epochs=2, batch_videos=4, seed=3
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two questions about each of the twelve clips."""
    rows = [
        {"video_id": f"clip-{i:02}", "q": question, "a": answer}
        for i in range(12)
        for question, answer in (("What is red?", "the square"), ("Is it night?", ("yes", "no")[i % 2]))
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def store(tmp_path, indexed):
    return str(shutil.copytree(indexed, tmp_path / "store"))


def order_for(store, model, data, to, recipe=RECIPE, **options):
    return TrainOrder(store, model, str(to), recipe, data=str(data), **options)


def straight(store, model, data, recipe):
    """The loss curve and the model of a run without Ray, from the same plan and tokens."""
    opened = Store.open(store)
    snapshot, stored = opened.pin(), opened.active_recipe().recipe
    plan = plan_training(snapshot, read_conversations(str(data)), stored.fingerprint)
    plan = pa.concat_tables(plan.blocks(recipe, 0, 1, 0))
    rows = Reader(ReaderConfig(snapshot, sight_of(model), recipe.max_length, None))(plan).to_pylist()
    batches = [list(map(example_from_row, members)) for _, members in groupby(rows, key=lambda row: row["step"])]
    curve = []
    finetuner = finetune(
        load_longvlm(model), batches, recipe, len(batches), on_step=lambda step: curve.append(step.loss)
    )
    return curve, finetuner.trainable.merge_and_unload()


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / LOSSES).read_text().splitlines()]


def test_a_model_learns_from_stored_tokens_and_answers(store, model, data, tmp_path, monkeypatch):
    to = tmp_path / "trained"
    report = run_train(order_for(store, model, data, to, replace(RECIPE, epochs=8)))
    assert (report.stopped, report.refused, report.plan.num_missing) == (None, [], 0)
    told = report.as_json()
    assert (told["steps"], told["videos"], told["conversations"]) == (24, 12, 24)
    assert 0 < told["step_s"] < told["wall_s"]
    curve = losses(to)
    assert curve[-1] == told["final_loss"] < 0.5 * curve[0]
    assert (to / "loss.png").stat().st_size > 5000
    card = (to / "README.md").read_text()
    assert all(word in card for word in ("24 steps", "learning_rate = 0.003", "videos: 12", store, RECIPE.stage))
    answered = run_answer(AnswerOrder(store, ask("What is red?"), model=str(to), precision="float32", max_new_tokens=6))
    assert {row["answer"] for row in answered.rows()} == {"the square"}
    (run,) = rows(store, "FROM runs WHERE job = 'train'")
    assert json.loads(run["counts"])["steps"] == 24
    monkeypatch.setattr("longvlm.jobs.train.run.open_executor", None)  # nothing is left to train
    again = run_train(order_for(store, model, data, to, replace(RECIPE, epochs=8)))
    assert again.as_json()["final_loss"] == told["final_loss"]
    assert losses(to) == curve
    with pytest.raises(InputError, match="holds a run with another recipe; name a new folder"):
        run_train(order_for(store, model, data, to))


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(store, model, data, tmp_path, monkeypatch):
    """Without Ray: what was saved is taken up, what was done after that is done again, and old states are removed."""
    recipe = replace(RECIPE, save_every_steps=2, keep_checkpoints=1)
    record = RunLog.record

    def interrupted(log, result, *rest):
        record(log, result, *rest)
        if result.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "record", interrupted)
        report = run_train(order_for(store, model, data, tmp_path / "to", recipe))
    assert (report.stopped, len(losses(tmp_path / "to"))) == ("interrupted", 5)
    assert num_steps_done(newest_checkpoint(tmp_path / "to")) == 4
    assert run_train(order_for(store, model, data, tmp_path / "to", recipe)).stopped is None
    curve, whole = straight(store, model, data, recipe)
    assert losses(tmp_path / "to") == pytest.approx(curve, abs=1e-6)
    assert load_longvlm(str(tmp_path / "to")).projector.weight.allclose(whole.projector.weight, atol=1e-5)
    assert [path.name for path in (tmp_path / "to" / CHECKPOINTS).glob("*/*")] == ["checkpoint_000000006"]


def test_a_worker_that_breaks_stops_the_run_with_its_error(store, model, data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(InProcessContext, "report", full)
    report = run_train(order_for(store, model, data, tmp_path / "to"))
    assert report.stopped == "OSError: [Errno 28] No space left on device"
    assert not (tmp_path / "to" / "model.safetensors").exists()


@pytest.mark.usefixtures("on_ray")
def test_two_workers_learn_what_one_does_and_one_goes_on_from_what_they_saved(store, model, data, tmp_path):
    recipe = replace(RECIPE, batch_videos=5, average="answer", save_every_steps=2)
    report = run_train(order_for(store, model, data, tmp_path / "to", recipe, workers=2))
    assert report.stopped is None
    curve, alone = straight(store, model, data, recipe)
    assert losses(tmp_path / "to") == pytest.approx(curve, abs=1e-4)
    shared = load_longvlm(str(tmp_path / "to"))
    assert shared.projector.weight.allclose(alone.projector.weight, atol=1e-4)

    cut = shutil.copytree(tmp_path / "to", tmp_path / "cut")  # as if the run had been killed at its last step
    shutil.rmtree(newest_checkpoint(cut))
    for name in ("model.safetensors", CARD):
        (cut / name).unlink()
    assert num_steps_done(newest_checkpoint(cut)) == 4
    went_on = run_train(order_for(store, model, data, cut, recipe, ray_address=IN_PROCESS))
    assert went_on.stopped is None
    assert losses(cut) == pytest.approx(curve, abs=1e-4)
    assert load_longvlm(str(cut)).projector.weight.allclose(alone.projector.weight, atol=1e-4)


def test_what_cannot_be_learnt_from_is_counted_and_listed(store, model, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows += [
        {"video_id": "gone.mp4", "q": "Why?", "a": "because"},
        {"video_id": "clip-03", "q": "Who?", "a": "a " * 3000},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    report = run_train(order_for(store, model, path, tmp_path / "to", replace(projector(), batch_videos=12, epochs=1)))
    assert (report.stopped, report.plan.num_missing, report.plan.first_missing) == (None, 1, "gone.mp4")
    (refused,) = report.refused
    assert refused["id"] == "26"
    assert "more than the 2048 that a sequence may have" in refused["error"]
    assert math.isfinite(report.as_json()["final_loss"])


def test_a_diverging_run_stops_with_a_sentence(store, model, data, tmp_path):
    recipe = replace(RECIPE, learning_rate=1e30, clip_norm=1e30, warmup_ratio=0.0)
    report = run_train(order_for(store, model, data, tmp_path / "to", recipe))
    assert "lower the learning rate" in report.stopped
    assert report.as_json()["checkpoint"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "TOWER"}, "is a vision tower"),
        ({"data": "ELSEWHERE"}, "none of the 1 conversations is about a video that is indexed for this model"),
        ({"data": None}, "name conversations to train on with --data FILE or with --sql QUERY"),
        ({"data": None, "sql": "DROP TABLE videos"}, "must be one SELECT"),
        (
            {"data": None, "sql": "SELECT video_id, 'Why?' AS q FROM videos"},
            "row 1 of the conversations has no text in a",
        ),
        ({"to": "STORE"}, "holds something else already"),
        ({"recipe": replace(RECIPE, template="other")}, "has no template other"),
        ({"workers": 2}, "--workers 2 needs Ray"),
    ],
)
def test_wrong_input_is_told_in_a_sentence(store, model, data, tmp_path, options, said):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps([{"video_id": "elsewhere.mp4", "q": "Why?", "a": "because"}]))
    named = {"TOWER": f"{model}/tower", "ELSEWHERE": str(elsewhere), "STORE": store}
    given = {"model": model, "data": str(data), "to": str(tmp_path / "to"), "recipe": RECIPE, **options}
    given = {name: named.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    with pytest.raises(InputError, match=said):
        run_train(TrainOrder(store, **given))
    assert not (tmp_path / "to" / LOSSES).exists()


@pytest.fixture(params=["tinyworld", "a relative path", "~", "owner/name"])
def spelling(request, model, tmp_path, monkeypatch):
    """A model as a user names it: the one that comes along, a folder from here or from home, or one of the hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tinyworld, "MODEL", model)
    if request.param == "a relative path":
        return os.path.relpath(model)
    if request.param == "~":
        monkeypatch.setenv("HOME", str(Path(model).parent))
        return f"~/{Path(model).name}"
    if request.param == "owner/name":
        cached = tmp_path / "hub" / "models--owner--name"
        shutil.copytree(model, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return request.param


def test_every_way_to_name_a_model_trains(spelling, store, tmp_path, monkeypatch):
    """Workers are in another folder than the user, and the model is as open to others as whatever is new here."""

    def elsewhere(config, context):
        with chdir("/"):
            return run_loop(config, context)

    monkeypatch.setattr("longvlm.jobs.train.loop.run_loop", elsewhere)
    recipe = tmp_path / "work" / "short.toml"
    recipe.write_text('base = "projector"\nmax_steps = 1\nbatch_videos = 1\nprecision = "float32"\n')
    query = "SELECT video_id, 'How long is it?' AS q, 'long' AS a FROM videos LIMIT 1"
    words = ["train", "--store", os.path.relpath(store), "--model", spelling, "--to", "to", "--recipe", "short.toml"]
    done = CliRunner().invoke(main, [*words, "--sql", query, "--ray-address", "none", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["steps"], told["stopped"], told["checkpoint"]) == (1, None, str(tmp_path / "work" / "to"))
    assert f"`{spelling}` after 1 steps" in Path("to/README.md").read_text()
    new = tmp_path / "new"
    new.mkdir()
    (new / "file").touch()
    found = {path.stat().st_mode for path in (tmp_path / "work" / "to").rglob("*")}
    assert found == {new.stat().st_mode, (new / "file").stat().st_mode}


def test_the_command_trains_from_a_query(store, model, tmp_path, capsys):
    query = "SELECT video_id, 'How long is it?' AS q, 'long' AS a FROM videos WHERE duration_s > 2"
    recipe = tmp_path / "short.toml"
    recipe.write_text('base = "lora"\nlora_rank = 2\nmax_steps = 2\nbatch_videos = 2\nprecision = "float32"\n')
    arguments = ["--store", store, "--model", model, "--to", str(tmp_path / "to"), "--sql", query, "--json"]
    main(["train", *arguments, "--recipe", str(recipe)], standalone_mode=False)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["steps"] == 2
    assert told["checkpoint"] == str(tmp_path / "to")
    assert {"run_id", "final_loss", "wall_s", "read_s", "step_s"} <= told.keys()
    assert load_longvlm(str(tmp_path / "to")).llm.config.hidden_size == 128
