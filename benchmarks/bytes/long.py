"""A very long video by one decoder and shared out among several, through the whole index job on a local Ray.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.bytes.long [--mb 500] [--rounds 1] [--files FOLDER]

The video is a real clip made long, as in `benchmarks.bytes` (some minutes to make, kept with `--files`); the tower is a
small CLIP, so that decoding is what takes the time. As an hour of decoding is too long to wait for, what counts as long
is a twentieth of what one decoder takes, and a part is a quarter of it. Every side runs in a fresh process bound to two
cores. Tokens have to be equal bit for bit. The last line is one JSON object.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

CORES = 2
LONG_SHARE, PART_SHARE = 0.05, 0.25  # of the seconds that one decoder takes


def run_side(file: Path, tower: Path, alone_s: float | None) -> dict[str, Any]:
    """Index the video once, in this process; shared out if it is known how long one decoder takes."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    import longvlm.jobs.index.run
    from longvlm.jobs.cluster import resources
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.pipeline.source.corpus import Source

    if alone_s is not None:
        resources.PART_DECODE_S = PART_SHARE * alone_s
        vars(longvlm.jobs.index.run)["for_index"] = lambda *facts, **options: replace(
            resources.for_index(*facts, **options), long_decode_s=LONG_SHARE * alone_s
        )
    with tempfile.TemporaryDirectory() as out:
        recipe = Path(out) / "recipe.json"
        recipe.write_text(json.dumps({"base": "long", "precision": "float32"}))
        order = IndexOrder(Source(str(file)), f"{out}/store", model=str(tower), recipe=str(recipe))
        report = longvlm.jobs.index.run.run_index(order)
        if report.counts.indexed != 1 or report.stopped:
            raise RuntimeError(f"the run is no measurement: {report}")
        found = {"work_s": report.work_s, "video_s": report.counts.video_seconds, "tokens": digest(f"{out}/store")}
        stages = {name: (stage["done"], stage["cpu_s"]) for name, stage in report.stages.items()}
        return found | {"stages": stages}


def digest(store: str) -> str:
    """Of all tokens of the one video, in order."""
    from longvlm.pipeline.store import catalog
    from longvlm.pipeline.store.ledger import Store
    from longvlm.pipeline.store.shards import read_tokens

    snapshot = Store.open(store).pin()
    with catalog.connect(snapshot) as con:
        write_ids = [write_id for (write_id,) in con.execute("SELECT write_id FROM live_videos").fetchall()]
    table = read_tokens(snapshot, write_ids).sort_by("segment").drop_columns(["write_id"])
    return hashlib.sha256(repr(table.to_pylist()).encode()).hexdigest()


def make_video(folder: Path, least_mb: int) -> Path:
    """A clip of 720p made long, with groups of pictures of two seconds."""
    from benchmarks.bytes.corpus import clips_to_lengthen, make_corpus

    clip = next(clip for clip in clips_to_lengthen() if clip.name.startswith("sam2__01_dog"))
    (made,) = make_corpus(folder, [clip], 1, least_bytes=least_mb << 20, master_s=20)
    return folder / "bucket" / made.name


def main() -> None:
    """Run both sides in turn and compare medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500, help="of the video")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--files", type=Path, help="folder where the video is kept")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        file, tower, alone_s = json.loads(options.side)
        print(json.dumps(run_side(Path(file), Path(tower), alone_s)))
        return
    from benchmarks.untrained_tower import build_untrained_tower

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.files or Path(scratch) / "files"
        folder.mkdir(parents=True, exist_ok=True)
        file = make_video(folder, options.mb)
        build_untrained_tower(Path(scratch) / "tower")
        runs: dict[str, list[dict[str, Any]]] = {"alone": [], "shared": []}
        for _ in range(options.rounds):
            for side, measured in runs.items():
                alone_s = runs["alone"][0]["stages"]["decode"][1] if side == "shared" else None
                told = json.dumps([str(file), f"{scratch}/tower", alone_s])
                command = [sys.executable, "-m", "benchmarks.bytes.long", "--side", told]
                done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ourselves
                measured.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"  {side:7} {measured[-1]['work_s']:7.1f} s  {measured[-1]['stages']}", file=sys.stderr)
    medians = {side: median(run["work_s"] for run in measured) for side, measured in runs.items()}
    tokens = {run["tokens"] for measured in runs.values() for run in measured}
    result = {
        "video_hours": runs["alone"][0]["video_s"] / 3600,
        "rounds": options.rounds,
        **{f"{side}_s": work_s for side, work_s in medians.items()},
        "speedup": medians["alone"] / medians["shared"],
        "parts": runs["shared"][0]["stages"]["parts"][0],
        "same_tokens": len(tokens) == 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
