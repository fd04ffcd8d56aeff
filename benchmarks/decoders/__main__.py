"""What a sampled frame costs by each decoder, by codec, size and length of groups, and whether it is the right one.

    LONGVLM_VIDEOS=../shared/videos python -m benchmarks.decoders [--rounds 2] [--clips FOLDER] [--steps]

A scene of the lent clips is encoded in fourteen ways (some 90 CPU seconds, kept with `--clips`); the lent clips are
taken as they are, but for long ones. Sampled is as the recipe `long` does, a frame a second, and keyframes as keyframe
mode does, at 224 pixels. All decoders run in turn, in this process and on one thread; figures are medians of CPU
milliseconds a frame, with the opening of the file. A frame is right if it is that of plain decoding from the first one
on: bit for bit for PyAV, for others within the rounding of another resizer. With `--steps` instead, over the lent
clips, what a frame costs in each step from its file to its tower. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import av
import numpy as np

from benchmarks.decoders.clips import SCENE, lent_clips, make_clips
from benchmarks.decoders.steps import measure
from benchmarks.decoders.ways import DECORD, TORCHCODEC, by_plain_decoding, keyframes_of, ways_of
from longvlm.pipeline.decode.sampling import plan_segments
from longvlm.pipeline.decode.video import Mode, OpenVideo
from longvlm.schemas.recipe import Decode, long, paper
from longvlm.schemas.tower import TowerSpec

PX, MOST_KEYFRAMES = 224, 12
# Mean of levels between the frames of two resizers; neighbouring frames of a moving scene differ by more.
LARGEST_DIFFERENCE = {DECORD: 4.0, TORCHCODEC: 4.0}
TOWER = TowerSpec("none", "none", 4, (4, 4), 64, PX, has_cls=True, search_dim=None)


def sampled(path: Path) -> list[int]:
    """The frame numbers that the recipe `long` takes, each once."""
    video = OpenVideo(str(path), "exact")
    video.reader.close()
    return sorted({frame for segment in plan_segments(long(TOWER), video.info) for frame in segment.frames})


def compare(path: Path, mode: Mode, wanted: list[int], rounds: int) -> dict[str, Any]:
    """Of each way the CPU milliseconds a frame, and how many frames are wrong; or what it says where it gives none."""
    right = by_plain_decoding(path, wanted, (PX, PX), mode)
    ways = ways_of(mode)
    found: dict[str, Any] = {}
    spent: dict[str, list[float]] = {}
    for name, way in ways.items():
        try:
            pixels = way(path, wanted, (PX, PX))
        except Exception as error:  # noqa: BLE001 - whatever a decoder raises is what came of it
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        apart = np.abs(pixels.astype(int) - right).mean(axis=(1, 2, 3))
        found[name] = {"wrong": int((apart > LARGEST_DIFFERENCE.get(name, 0.0)).sum()), "same_bits": not apart.any()}
        spent[name] = []
    for _ in range(rounds):
        for name, seconds in spent.items():
            started = time.process_time()
            ways[name](path, wanted, (PX, PX))
            seconds.append(time.process_time() - started)
    for name, seconds in spent.items():
        found[name]["ms"] = 1e3 * median(seconds) / len(wanted)
    return {"frames": len(wanted), **found}


def told(name: str, found: Mapping[str, Any]) -> str:
    """One way's cell."""
    if "error" in found:
        return f"{name}: -"
    return f"{name}: {found['ms']:.1f}" + (f" ({found['wrong']} wrong)" if found["wrong"] else "")


def print_steps(clips: list[Path], rounds: int) -> None:
    """Measure what frames of some clips pass through, by mode, and print it."""
    found: dict[str, dict[str, float]] = {}
    for mode in get_args(Decode):
        for name, recipe in (("long", long(TOWER)), ("paper", paper(TOWER))):
            steps = found[f"{name}, {mode}"] = measure(clips, replace(recipe, decode=mode), rounds)
            cells = ", ".join(f"{step} {ms:.2f}" for step, ms in steps.items())
            print(f"  {name:5} {mode:8} CPU ms a frame: {cells}", flush=True)
    print(json.dumps({"rounds": rounds, "clips": len(clips), "steps": found}))


def main() -> None:
    """Compare on every clip and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clips", type=Path, help="folder where what is encoded is kept")
    parser.add_argument(
        "--steps", action="store_true", help="the steps from a lent clip to a tower, and no other decoder"
    )
    options = parser.parse_args()
    av.logging.set_level(None)
    lent = lent_clips()
    if options.steps:
        print_steps(lent, options.rounds)
        return
    scene = next(clip for clip in lent if clip.name == SCENE)
    result: dict[str, Any] = {"exact": {}, "keyframe": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.clips or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*make_clips(scene, folder), *lent]:
            asked: dict[Mode, list[int]] = {"exact": sampled(path), "keyframe": keyframes_of(path, MOST_KEYFRAMES)}
            for mode, wanted in asked.items():
                found = result[mode][path.name] = compare(path, mode, wanted, options.rounds)
                cells = ", ".join(told(name, found[name]) for name in ways_of(mode))
                print(f"  {path.name:44} {mode:8} {len(wanted):3} frames, CPU ms each: {cells}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
