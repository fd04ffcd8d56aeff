"""A job in a folder with Python files of one's own: neither its driver, its workers nor their children take them.

Of workers it is shown where a run loses its cluster, in test_watch.py.
"""

import json
import subprocess
import sys

from longvlm.pipeline.decode.isolate import Decoder
from support import stray_folder


def test_a_run_takes_none_of_them(tmp_path, clips, model):
    """The store is a path that counts from there."""
    folder = stray_folder(tmp_path / "own")
    command = [sys.executable, "-m", "longvlm", "index", str(clips), "--store", "store", "--model", model]
    command += ["--recipe", "tiny", "--limit", "1", "--ray-address", "none", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["indexed"], counts["failed"]) == (1, 0)
    assert "stray" not in done.stdout + done.stderr
    assert (folder / "store" / "videos").is_dir()


def test_a_decoders_child_takes_none_of_them(tmp_path, clips, monkeypatch):
    monkeypatch.syspath_prepend(str(stray_folder(tmp_path / "own")))  # as Ray did with the folder of a driver
    with Decoder(deadline_s=60, memory_limit_bytes=1 << 30) as decoder:
        assert decoder.probe(str(clips / "clip-00.mp4")).num_frames == 25
