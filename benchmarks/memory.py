"""Memory use over a long run: the real clips under 500 names in one run.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.memory [--files 500]

Watches the private memory of every worker of the run and of its decoder children. Compared is what they held when 50
videos were decoded with what they held at the end. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
from ray.util import list_named_actors

from benchmarks.index import make_corpus
from benchmarks.untrained_tower import build_untrained_tower
from longvlm.jobs.cluster.session import connect
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source

EARLY_VIDEOS = 50
STAGES = {"MapBatches(Watch)": "decode", "MapBatches(Encode)": "encode", "isolate": "decoder child"}


def worker_memory() -> dict[str, int]:
    """Private bytes (USS) of the workers of each stage and of the decoder children, now."""
    held: dict[str, int] = defaultdict(int)
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            for mark, stage in STAGES.items():
                if mark in command:
                    held[stage] += process.memory_full_info().uss
        except psutil.Error:  # it ended while we looked
            continue
    return held


def watch_run(files: Path, tower: Path, store: Path, num_files: int) -> tuple[Any, list[tuple[int, dict[str, int]]]]:
    """Index the files; returns the report and (videos decoded so far, memory held) every half second."""
    samples: list[tuple[int, dict[str, int]]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            for name in list_named_actors():  # the run's tally, once it is there
                stages = ray.get(ray.get_actor(name).report.remote())
                samples.append((int(stages.get("decode", {}).get("done", 0)), worker_memory()))

    watcher = threading.Thread(target=sample)
    watcher.start()
    recipe = store.with_suffix(".json")
    recipe.write_text(json.dumps({"base": "paper", "precision": "float32"}))
    try:
        report = run_index(IndexOrder(Source(str(files)), str(store), model=str(tower), recipe=str(recipe)))
    finally:
        done.set()
        watcher.join()
    if report.counts.indexed != num_files:
        raise RuntimeError(f"the run is no measurement: {report}")
    return report, samples


def main() -> None:
    """Run once and compare the workers' memory early and late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=500)
    options = parser.parse_args()
    connect(None)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_corpus(Path(folder) / "videos", options.files, decord_only=False)
        build_untrained_tower(Path(folder) / "tower")
        report, samples = watch_run(
            Path(folder) / "videos", Path(folder) / "tower", Path(folder) / "store", options.files
        )
    early = [held for decoded, held in samples if EARLY_VIDEOS <= decoded < 2 * EARLY_VIDEOS]
    late = [held for decoded, held in samples if options.files - EARLY_VIDEOS <= decoded]
    print(f"{options.files} files of {len(clips)} clips in {report.wall_s:.0f} s; private memory, medians of samples")
    result: dict[str, Any] = {"files": options.files, "clips": len(clips)}
    for stage in [*STAGES.values(), "all"]:
        first, last = (
            median(sum(held.values()) if stage == "all" else held[stage] for held in part) for part in (early, late)
        )
        print(f"  {stage:14} {first / 1e6:7.0f} MB after {EARLY_VIDEOS}, {last / 1e6:7.0f} MB at the end")
        result[f"growth_{stage.replace(' ', '_')}"] = last / first - 1
    print(json.dumps(result))


if __name__ == "__main__":
    main()
