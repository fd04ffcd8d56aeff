"""The command line as a person meets it: how soon anything is on the screen, and how long a look at a store takes.

    python -m benchmarks.cli [--rounds 5]

Every command runs over a store of one small video, in turn with the others, each on a terminal of its own (a
pseudo-terminal), from the start of its process to the first character that can be seen; then it is ended. `status` and
`sql "SELECT 1"` run to their end. All figures are medians of the rounds, after one that is not counted. The last line
is one JSON object.
"""

import argparse
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.measure import interleave
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.tinyworld.world import make_world

_INVISIBLE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\s")  # what moves the cursor, and blanks


def run_on_terminal(words: list[str]) -> tuple[float, float]:
    """Seconds of a command until the first visible character, and until its end."""
    ours, its = pty.openpty()
    started_s = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "longvlm", *words], stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    shown, first_s = b"", 0.0
    for text in _read(ours):
        shown += text
        if not first_s and _INVISIBLE.sub(b"", shown):
            first_s = time.perf_counter() - started_s
            if words[0] not in ("status", "sql"):
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(ours)
    if not first_s:
        raise RuntimeError(f"longvlm {words} showed nothing")
    return first_s, time.perf_counter() - started_s


def _read(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal, until nobody has it open any more."""
    while True:
        try:
            text = os.read(terminal, 4096)
        except OSError:  # Linux's way of saying so
            return
        if not text:
            return
        yield text


def commands(folder: Path) -> dict[str, list[str]]:
    """Every command that can run here, over a folder of videos and its store."""
    videos, store, questions = str(folder / "videos"), str(folder / "store"), str(folder / "questions.csv")
    Path(questions).write_text("question\nWhat does the camera do?\n")
    at = ["--store", store]
    to = str(folder / "trained")
    return {
        "help": ["--help"],
        "demo": ["demo", "--folder", str(folder / "another")],
        "index": ["index", videos, *at],
        "answer": ["answer", *at, "--questions", questions],
        "search": ["search", *at, "a red circle"],
        "sql": ["sql", *at, "SELECT 1"],
        "export": ["export", *at, "--to", str(folder / "index.duckdb"), "--force"],
        "status": ["status", *at],
        "status --runs": ["status", *at, "--runs"],
        "recipe list": ["recipe", "list", *at],
        "train": ["train", *at, "--model", "tinyworld", "--data", questions, "--to", to],
        "evaluate": ["evaluate", "--benchmark", "tinyworld", "--videos", "1"],
        "compare": ["compare", videos, "--model", "tinyworld", "--questions", questions],
        "nightly": ["nightly", videos, *at],
        "maintain": ["maintain", *at],
        "submit": ["submit", "--address", "http://127.0.0.1:9", "maintain", *at],
        "doctor": ["doctor", videos, *at],
    }


def main() -> None:
    """Make a store, run all commands in turn, print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="longvlm-cli-") as folder:
        videos = Path(folder, "videos")
        make_world(videos, seed=1000, num_videos=1)
        run_index(IndexOrder(Source(str(videos)), f"{folder}/store", model="tinyworld", ray_address="none"))
        words = commands(Path(folder))
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in words}

        def run(name: str) -> None:
            seen[name].append(run_on_terminal(words[name]))

        interleave({name: partial(run, name) for name in words}, rounds)
    firsts = {name: median(first for first, _ in times[1:]) for name, times in seen.items()}
    status_s, sql_s = (median(end for _, end in seen[name][1:]) for name in ("status", "sql"))
    for name, first_s in firsts.items():
        print(f"{name:>14}  {first_s:.3f} s to the first character")
    print(f"status takes {status_s:.2f} s, sql {sql_s:.2f} s")
    told = {
        "rounds": rounds,
        "first_visible_s": {name: round(first_s, 3) for name, first_s in firsts.items()},
        "slowest_first_visible_s": round(max(firsts.values()), 3),
        "status_s": round(status_s, 3),
        "sql_s": round(sql_s, 3),
        "status_by_sql": round(status_s / sql_s, 2),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
