"""A job in a folder with Python files of one's own: neither its driver, its workers nor their children take them."""

import json
import os
import subprocess
import sys

from longvlm.pipeline.decode.isolate import Decoder
from support import stray_folder


def index(folder, clips, model, *command, **env):
    """Index from within a folder; the store is a path that counts from there, its workers have a path of their own."""
    told = ["index", str(clips), "--store", "store", "--model", model, "--recipe", "tiny", "--limit", "2", "--json"]
    env = {**os.environ, **env}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*command, *told], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["indexed"], counts["failed"]) == (2, 0)
    assert "stray" not in done.stdout + done.stderr


def test_a_local_run_takes_none_of_them(tmp_path, clips, model):
    folder = stray_folder(tmp_path / "own")
    index(folder, clips, model, sys.executable, "-m", "longvlm")
    assert (folder / "store" / "videos").is_dir()


def test_a_decoders_child_takes_none_of_them(tmp_path, clips, monkeypatch):
    monkeypatch.syspath_prepend(str(stray_folder(tmp_path / "own")))  # as Ray did with the folder of a driver
    with Decoder(deadline_s=60, memory_limit_bytes=1 << 30) as decoder:
        assert decoder.probe(str(clips / "clip-00.mp4")).num_frames == 25
