"""The world is real; in place of the model that is trained on it stands a small one with random weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from stores import rows

from longvlm import tinyworld
from longvlm.jobs.cli import main
from longvlm.jobs.evaluate.run import EvaluateOrder
from longvlm.jobs.evaluate.tinyworld import TinyWorldSpec, run_tinyworld
from longvlm.schemas.errors import InputError
from longvlm.tinyworld.typed import TYPED_KINDS


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch, model):
    monkeypatch.setattr(tinyworld, "MODEL", model)
    monkeypatch.setattr(tinyworld, "RECIPE", "tiny")


def test_the_command_makes_a_world_and_ends_with_one_object():
    command = [
        "evaluate",
        "--benchmark",
        "tinyworld",
        "--seed",
        "3",
        "--videos",
        "2",
        "--max-new-tokens",
        "2",
        "--json",
    ]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    (line,) = shown.stdout.splitlines()
    told = json.loads(line)
    assert told["num_judged"] == told["num_questions"] == sum(told["num_by_kind"].values()) > 10
    assert (told["num_missing"], told["judge"], set(told["by_kind"])) == (0, "exact#1", set(told["num_by_kind"]))
    assert 0 <= told["accuracy"] <= 1


def test_beside_a_store_the_world_stays_and_nothing_is_done_twice(tmp_path):
    order = EvaluateOrder(str(tmp_path / "store"), model="tinyworld", max_new_tokens=2)
    (tmp_path / ".store-tinyworld-0-2").mkdir()  # of a run that was killed
    (tmp_path / ".store-tinyworld-0-2" / "half").touch()
    first = run_tinyworld(order, TinyWorldSpec(num_videos=2)).as_json()
    again = run_tinyworld(order, TinyWorldSpec(num_videos=2)).as_json()
    assert (again["verdicts_new"], again["verdicts_reused"]) == (0, first["verdicts_new"])
    other = run_tinyworld(order, TinyWorldSpec(num_videos=1)).as_json()  # the same names in another folder
    assert (other["num_missing"], other["verdicts_new"]) == (0, 0)
    assert other["verdicts_reused"] == other["num_questions"]
    assert len(rows(order.store, "FROM videos")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "store", "store-tinyworld-0-1", "store-tinyworld-0-2"
    ]  # fmt: skip


def test_typed_questions_are_benchmarks_of_their_own_beside_the_same_videos(tmp_path):
    order = EvaluateOrder(str(tmp_path / "store"), max_new_tokens=12)
    found = {
        name: run_tinyworld(replace(order, benchmark=name), TinyWorldSpec(num_videos=1)).as_json()
        for name in ("tinyworld-bool", "tinyworld-number")  # the stand-in lacks words of choices
    }
    for name, told in found.items():
        assert (told["benchmark"], told["num_missing"]) == (name, 0)
        assert set(told["num_by_kind"]) <= set(TYPED_KINDS[name.partition("-")[2]])
        assert (told["calibration_error"] is None) == (name == "tinyworld-number")
    assert len(rows(order.store, "FROM videos")) == 1
    with pytest.raises(InputError, match="there is no benchmark tinyworld-json"):
        run_tinyworld(replace(order, benchmark="tinyworld-json"), TinyWorldSpec(num_videos=2))


def test_a_model_of_another_world_is_refused(tmp_path, model):
    config = json.loads((Path(model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {tinyworld.VERSION_FIELD: 99}))
    with pytest.raises(InputError, match="version 99 of the tiny world"):
        run_tinyworld(EvaluateOrder(str(tmp_path / "store"), model=str(tmp_path)), TinyWorldSpec(num_videos=2))
    assert not (tmp_path / "store").exists()
