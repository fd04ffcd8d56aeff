import json
from pathlib import Path
from string import digits

import longvlm.tinyworld.make
from longvlm import tinyworld
from longvlm.jobs.choose import choose_train_recipe
from longvlm.jobs.cli import main
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.training import TrainRecipe
from longvlm.tinyworld.make import HERE, TYPED_RUNS, make_model, tell_figures, typed_words, vocabulary
from longvlm.tinyworld.world import video_name


def test_a_small_model_is_made_by_the_commands_that_anybody_would_use(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(longvlm.tinyworld.make, "_run", lambda *words: main(words, standalone_mode=False))
    monkeypatch.setenv("RAY_ADDRESS", IN_PROCESS)  # saves starting Ray, and its workers
    monkeypatch.setattr(TrainRecipe, "num_steps", lambda *_: 1)
    few_runs = {name: TYPED_RUNS[name] for name in ("typed", "typed-fresh")}
    monkeypatch.setattr(longvlm.tinyworld.make, "TYPED_RUNS", few_runs)
    model = make_model(tmp_path / "work", num_videos=2, tower_steps=2)
    config = json.loads((model / "config.json").read_text())
    assert config[tinyworld.VERSION_FIELD] == tinyworld.WORLD_VERSION
    assert (config["mm_prompt_layout"], config["mm_prompt_template"]) == ("time_markers", "brief")
    assert load_longvlm(str(model)).templates[0] == "brief"
    assert load_longvlm(str(model)).option_temperature == config["mm_option_temperature"] > 0
    card = (model / "README.md").read_text()
    assert card.count("## Recipe ") == 2 + len(few_runs)
    assert str(tmp_path) not in card
    assert Store.open(str(tmp_path / "work" / "store")).active_recipe().recipe.name == "tinyworld"
    rows = [json.loads(line) for line in (tmp_path / "work" / "conversations.jsonl").read_text().splitlines()]
    assert {row["video_id"] for row in rows} == {video_name(0, number) for number in range(2)}
    assert any("caption" in row for row in rows)
    both = [json.loads(line) for line in (tmp_path / "work" / "conversations-typed.jsonl").read_text().splitlines()]
    assert both[: len(rows)] == rows
    typed = {row["q"].rpartition("\n")[2] for row in both[len(rows) :]}
    assert {"Answer yes or no.", "Answer with a number."} <= typed
    capfd.readouterr()  # of the commands


def test_every_training_has_its_recipe():
    recipes = [choose_train_recipe(str(HERE / f"training-{name}.toml")) for name in TYPED_RUNS]
    assert {recipe.stage for recipe in recipes} == {"full"}


def test_the_words_are_small_in_number_and_those_of_the_shipped_model():
    words = json.loads(Path(tinyworld.MODEL, "tokenizer.json").read_text())["model"]["vocab"]
    as_text, typed = vocabulary(), typed_words()
    first = words[as_text[0]]
    assert [words[word] for word in (*as_text, *typed)] == list(range(first, len(words)))
    assert len(as_text) + len(typed) < 256
    assert {"red", "circle", "0:08", "house", ","} <= set(as_text)
    assert {*digits, *'{}[]":,-.', "true", "false", "null", "or"} <= {*typed, *as_text}


def test_figures_of_all_types_stand_in_the_card(tmp_path, monkeypatch):
    def evaluate(_, benchmark):
        kinds = {"count": 0.5} if benchmark.endswith("number") else {"count": 1.0, "what": 0.25}
        error = 0.0123 if benchmark.endswith(("bool", "choice")) else None
        return {"accuracy": 0.9, "num_questions": 7, "by_kind": kinds, "calibration_error": error}

    monkeypatch.setattr(longvlm.tinyworld.make, "_evaluate", evaluate)
    (tmp_path / "README.md").write_text(f"{longvlm.tinyworld.make._CARD_INTRO}# Trained")
    tell_figures(tmp_path)
    lines = (tmp_path / "README.md").read_text().splitlines()
    start = lines.index("|  | text | bool | choice | number |")
    assert lines[start + 2 : start + 7] == [
        "| questions | 7 | 7 | 7 | 7 |",
        "| right | 90.0 % | 90.0 % | 90.0 % | 90.0 % |",
        "| expected calibration error |  | 1.2 % | 1.2 % |  |",
        "| right of count | 100.0 % | 100.0 % | 100.0 % | 50.0 % |",
        "| right of what | 25.0 % | 25.0 % | 25.0 % |  |",
    ]
    assert lines[-1] == "# Trained"
