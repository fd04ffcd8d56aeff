"""Indexing against a straightforward one-process loop that does what the reference does, both on two threads.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.index [--files 306] [--rounds 3] [--only keyframe]

The files are copies of the real clips in $LONGVLM_VIDEOS/good that decord alone can read, since the loop has nothing
else; the tower is a small CLIP, so that the pipeline is measured and not the tower. The clock runs from the first
decode to the last commit; start-up is reported apart. Rounds are interleaved, every side in a fresh process bound to
two cores. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

THREADS = 2
SIDES = ("reference", "exact", "keyframe")


def make_corpus(folder: Path, num_files: int, *, decord_only: bool) -> list[str]:
    """Hard links of the good clips under many names; returns the names of the clips used."""
    good = Path(os.environ.get("LONGVLM_VIDEOS", "../shared/videos")) / "good"
    clips = [clip for clip in sorted(good.iterdir()) if not decord_only or _decord_reads(clip)]
    folder.mkdir()
    for i in range(num_files):
        clip = clips[i % len(clips)]
        shutil.copyfile(clip, folder / f"{i:04}-{clip.name}")
    return [clip.name for clip in clips]


def _decord_reads(clip: Path) -> bool:
    import decord

    try:
        decord.VideoReader(str(clip), num_threads=1)[0]
    except (decord.DECORDError, RuntimeError):
        return False
    return True


def run_side(side: str, files: Path, tower: Path) -> dict[str, Any]:
    """Index the folder once, in this process; returns seconds and, of ours, what each stage burnt."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    out = Path(tempfile.mkdtemp(dir=files.parent))
    try:
        if side == "reference":
            from benchmarks.reference_loop import index_plainly

            return {"work_s": index_plainly(sorted(files.iterdir()), tower, out, THREADS)}
        return _run_ours(side, files, tower, out)
    finally:
        shutil.rmtree(out)


def _run_ours(side: str, files: Path, tower: Path, out: Path) -> dict[str, Any]:
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.jobs.index.run import run_index
    from longvlm.pipeline.source.corpus import Source

    recipe = out / "recipe.json"
    recipe.write_text(json.dumps({"base": "paper", "precision": "float32", "decode": side}))
    order = IndexOrder(Source(str(files)), str(out / "store"), model=str(tower), recipe=str(recipe))
    report = run_index(order)
    if report.counts.failed or report.stopped:
        raise RuntimeError(f"the run is no measurement: {report}")
    return {"work_s": report.work_s, "startup_s": report.startup_s, "stages": report.stages}


def main() -> None:
    """Run all sides in turn and compare medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=306)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SIDES[1:], help="measure one side's overhead; the loop takes minutes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.folder / "videos", options.folder / "tower")))
        return
    from benchmarks.untrained_tower import build_untrained_tower

    with tempfile.TemporaryDirectory() as folder:
        clips = make_corpus(Path(folder) / "videos", options.files, decord_only=True)
        build_untrained_tower(Path(folder) / "tower")
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(options.rounds):
            for side in [options.only] if options.only else SIDES:
                command = [sys.executable, "-m", "benchmarks.index", "--side", side, "--folder", folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ourselves
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"  {side:9} {runs[side][-1]['work_s']:7.1f} s", file=sys.stderr)
    print_table(runs, options.files, clips)


def print_table(runs: dict[str, list[dict[str, Any]]], num_files: int, clips: list[str]) -> None:
    """Medians, ratios, what bounds each side; JSON last."""
    medians = {side: median(run["work_s"] for run in measured) for side, measured in runs.items()}
    num_rounds = len(next(iter(runs.values())))
    print(f"{num_files} files of {len(clips)} clips, {THREADS} threads, medians of {num_rounds} rounds")
    result: dict[str, Any] = {"files": num_files, "clips": len(clips), "rounds": num_rounds}
    for side, work_s in medians.items():
        result[f"{side}_s"] = work_s
        line = f"  {side:9} {work_s:7.1f} s  {num_files / work_s:6.1f} videos/s"
        if "reference" in medians and side != "reference":
            result[f"ratio_index_{side}"] = medians["reference"] / work_s
            line += f"  {medians['reference'] / work_s:5.2f} x the loop"
        print(line)
    for side in [side for side in SIDES[1:] if side in runs]:
        run = sorted(runs[side], key=lambda run: run["work_s"])[len(runs[side]) // 2]
        cpu_s = {name: stage["cpu_s"] for name, stage in run["stages"].items()}
        overhead = run["work_s"] / (sum(cpu_s.values()) / THREADS)
        bound = max(cpu_s, key=lambda name: cpu_s[name])
        shares = ", ".join(f"{name} {spent:.1f}" for name, spent in cpu_s.items())
        print(f"  {side}: stage CPU s: {shares}; bound by {bound}; wall is {overhead:.2f} x stage CPU / cores")
        print(f"  {side}: start-up before the first decode {run['startup_s']:.1f} s")
        result |= {f"overhead_{side}": overhead, f"bound_{side}": bound, f"startup_{side}_s": run["startup_s"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
