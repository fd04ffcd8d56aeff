import json

import longvlm.tinyworld.make
from longvlm import tinyworld
from longvlm.jobs.cli import main
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.models.longvlm.model import load_longvlm
from longvlm.pipeline.store.ledger import Store
from longvlm.tinyworld.make import make_model, vocabulary
from longvlm.tinyworld.world import video_name


def test_a_small_model_is_made_by_the_commands_that_anybody_would_use(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(longvlm.tinyworld.make, "_run", lambda *words: main(words, standalone_mode=False))
    monkeypatch.setenv("RAY_ADDRESS", IN_PROCESS)  # saves starting Ray, and its workers
    model = make_model(tmp_path / "work", num_videos=4, tower_steps=2)
    config = json.loads((model / "config.json").read_text())
    assert config[tinyworld.VERSION_FIELD] == tinyworld.WORLD_VERSION
    assert (config["mm_prompt_layout"], config["mm_prompt_template"]) == ("time_markers", "brief")
    assert load_longvlm(str(model)).templates[0] == "brief"
    card = (model / "README.md").read_text()
    assert card.count("## Recipe ") == 2
    assert str(tmp_path) not in card
    assert Store.open(str(tmp_path / "work" / "store")).active_recipe().recipe.name == "tinyworld"
    rows = [json.loads(line) for line in (tmp_path / "work" / "conversations.jsonl").read_text().splitlines()]
    assert {row["video_id"] for row in rows} == {video_name(0, number) for number in range(4)}
    assert any("caption" in row for row in rows)
    capfd.readouterr()  # of the commands


def test_the_vocabulary_is_the_same_every_time_and_small():
    assert vocabulary() == vocabulary()
    assert {"red", "circle", "0:08", "house", ","} <= set(vocabulary())
    assert len(vocabulary()) < 256
