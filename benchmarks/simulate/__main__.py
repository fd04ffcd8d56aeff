"""Histories of a simulated world, as many seeds as one likes: does anything ever differ from what a reader must see?

    python -m benchmarks.simulate [--seed 0] [--seeds 20] [--steps 60] [--jobs 2] [--hours H]
    python -m benchmarks.simulate --in-bucket [...]            over an S3 server, every request of which is a point
    python -m benchmarks.simulate --fault NAME [--seeds 50]    one mending of the store taken out: seeds until found
    python -m benchmarks.simulate --faults [--seeds 50]        each of them, as a table

A seed that fails prints its history, shrunk to the turns that it needs, and plays again exactly: nothing is drawn from
anything but the seed. It is bound by CPU: a history of 60 turns is some 36 jobs of the project's own. The last line is
one JSON object; the exit code is 1 if a history failed that should not, or a fault was not found.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from typing import Any

from benchmarks.simulate.faults import FAULTS
from benchmarks.simulate.run import Played, play
from benchmarks.simulate.turns import Turn, draw, shrink

SHRINKS = 60  # tries


def main(arguments: Sequence[str] | None = None) -> None:
    """Play, tell, and say by the exit code whether all was well."""
    options = _options(arguments)
    began_s = time.monotonic()
    if options.faults or options.fault:
        names = [options.fault] if options.fault else [*FAULTS]
        found = {name: _seeds_until_found(name, options) for name in names}
        said: dict[str, Any] = {"faults": found}
        is_well = all(seeds is not None for seeds in found.values())
    else:
        said = _play_all(options)
        is_well = not said["failed"]
    print(json.dumps({**said, "wall_s": round(time.monotonic() - began_s, 1)}))
    sys.exit(0 if is_well else 1)


def _play_all(options: argparse.Namespace) -> dict[str, Any]:
    totals = {"histories": 0, "jobs": 0, "points": 0, "cpu_s": 0.0}
    failed = []
    for seed, played, cpu_s in _played(options, None):
        totals["histories"] += 1
        totals["jobs"] += played.num_jobs
        totals["points"] += played.num_points
        totals["cpu_s"] = round(totals["cpu_s"] + cpu_s, 1)
        if played.problem:
            failed.append(seed)
            _tell(seed, options, played)
        elif totals["histories"] % 10 == 0:
            print(f"{totals['histories']} histories, {len(failed)} failed", flush=True)
    return {**totals, "steps": options.steps, "first_seed": options.seed, "failed": failed}


def _seeds_until_found(name: str, options: argparse.Namespace) -> int | None:
    """How many seeds it takes until the model notices that a mending is not there; None: more than were played."""
    for number, (seed, played, _) in enumerate(_played(options, name), 1):
        if played.problem:
            print(f"{name:28} {number:4} seeds (seed {seed}): {played.problem[:140]}", flush=True)
            return number
    print(f"{name:28} not found in {options.seeds} seeds", flush=True)
    return None


def _played(options: argparse.Namespace, fault: str | None) -> Iterator[tuple[int, Played, float]]:
    """The histories of the seeds, in their order, as far as the time reaches."""
    ends_s = time.monotonic() + (options.hours or 1e6) * 3600
    seeds = islice(count(options.seed), options.seeds)
    one = partial(_play_one, options, fault)
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else nullcontext() as pool:
        for some in iter(lambda: [*islice(seeds, 4 * options.jobs)], []):
            yield from pool.map(one, some) if pool else map(one, some)
            if time.monotonic() > ends_s:
                return


def _play_one(options: argparse.Namespace, fault: str | None, seed: int) -> tuple[int, Played, float]:
    began_s = time.process_time()
    with FAULTS[fault]() if fault else nullcontext():
        played = play(draw(seed, options.steps), seed, in_bucket=options.in_bucket)
    return seed, played, time.process_time() - began_s


def _tell(seed: int, options: argparse.Namespace, played: Played) -> None:
    """Print a history that failed, without the turns that it does not need."""

    def fails(turns: Sequence[Turn]) -> bool:
        return play(turns, seed, in_bucket=options.in_bucket).kind == played.kind

    print(f"seed {seed}, turn {played.step}: {played.problem}", flush=True)
    turns = draw(seed, options.steps)
    end = len(turns) if played.step is None else played.step + 1
    smallest = shrink(turns[:end], fails, SHRINKS)
    again = play(smallest, seed, in_bucket=options.in_bucket)
    print("  its history, shrunk:")
    print("\n".join(f"  {line}" for line in again.told), flush=True)
    print(f"  {again.problem}", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=20, help="how many, one after the other")
    parser.add_argument("--steps", type=int, default=60, help="turns of a history")
    parser.add_argument("--jobs", type=int, default=2, help="processes that play")
    parser.add_argument("--hours", type=float, help="begin no more histories after so long")
    parser.add_argument("--in-bucket", action="store_true", help="each request to an S3 server is a point")
    parser.add_argument("--fault", choices=[*FAULTS], help="take this mending out, and count seeds until it is found")
    parser.add_argument("--faults", action="store_true", help="each of them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
