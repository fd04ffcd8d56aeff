"""Training on a cluster that goes meanwhile ends in a sentence."""

import json
import shutil
import subprocess
import sys
import time

import psutil

_RECIPE = """
base = "full"
precision = "float32"
gradient_checkpointing = false
learning_rate = 3e-3
epochs = 4000
batch_videos = 1
save_every_steps = 5
"""


def test_a_training_whose_gcs_is_killed_says_so(monkeypatch, tmp_path, indexed, model):
    monkeypatch.setenv("RAY_ADDRESS", "local")  # a Ray of its own
    data, recipe, to = tmp_path / "rows.jsonl", tmp_path / "recipe.toml", tmp_path / "trained"
    store = shutil.copytree(indexed, str(tmp_path / "store"))  # the run stands in it afterwards
    data.write_text('{"video_id": "clip-00", "q": "What is red?", "a": "the square"}')
    recipe.write_text(_RECIPE)
    args = ["train", "--store", store, "--model", model, "--data", str(data), "--recipe", str(recipe)]
    code = f"""
from longvlm.jobs.cli import main
from longvlm.jobs.cluster import watch
watch._GCS_PATIENCE_S = 0.5
main([*{args!r}, "--to", {str(to)!r}, "--json"])
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(to.glob("checkpoints/*")):  # Ray Train has begun; its workers' start takes longer than the rest
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.2)
    (gcs,) = [child for child in psutil.Process(running.pid).children() if child.name() == "gcs_server"]
    gcs.kill()
    out, err = running.communicate(timeout=300)
    assert running.returncode == 1, err
    assert json.loads(out.splitlines()[-1])["stopped"].startswith("the Ray cluster was lost: its GCS at ")
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert "Traceback" not in err
