"""All fault trials: index runs are hurt in every way we know, and must lose nothing, double nothing and never hang.

    python -m benchmarks.faults [--videos 200] [--only KIND] [--seed 0]

A corpus of small H.264 videos, some of them broken, goes through the real command line, a local Ray head and a tower
with random weights. Each trial hurts a run, checks the store (counts add up, nothing live twice, every live token
readable, nothing unreadable visible), runs the same command again, which must do only what was left, and checks once
more. Runs commit every half second, so that there is something to be killed between. The last line is one JSON object;
the exit code is 1 if anything was lost, doubled, hung or otherwise not as it must be.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.faults import clock, processes, rot, sleep, storage
from benchmarks.faults.bucket import FaultyBucket
from benchmarks.faults.trial import MissedError, SkippedError, Trial
from benchmarks.faults.world import Ended, Head, HungError, RealWorld, make_world

Inflict = Callable[[Trial], list[Ended]]


@dataclass(frozen=True)
class Fault:
    """A kind of fault and how often it is tried."""

    inflict: Inflict
    times: int = 1


def all_faults(bucket: FaultyBucket) -> dict[str, Fault]:
    """Every kind by name; 20 kills of drivers at random moments and 10 of workers are among them."""
    return {
        "driver_killed_early": Fault(processes.driver_killed_early, 10),
        "driver_killed_late": Fault(processes.driver_killed_late, 10),
        "driver_killed_with_its_own_ray": Fault(processes.driver_killed_with_its_own_ray),
        "driver_killed_between_commits": Fault(processes.driver_killed_between_commits),
        "driver_interrupted": Fault(processes.driver_interrupted),
        "driver_terminated": Fault(processes.driver_terminated),
        "decoder_killed": Fault(processes.decoder_killed, 3),
        "encoder_killed": Fault(processes.encoder_killed, 3),
        "writer_killed": Fault(processes.writer_killed, 2),
        "child_killed": Fault(processes.child_killed, 2),
        "encoder_dies_in_batch": Fault(processes.encoder_dies_in_batch),
        "driver_asleep_past_retention": Fault(sleep.driver_asleep_past_retention),
        "encoder_stopped_stall": Fault(sleep.encoder_stopped_stall),
        "encoder_stopped_max_hours": Fault(sleep.encoder_stopped_max_hours),
        "child_hangs": Fault(processes.poisoned("hang", "deadline")),
        "child_swells": Fault(processes.poisoned("swell", "memory_limit")),
        "child_crashes": Fault(processes.poisoned("crash", "decoder_crashed")),
        "node_lost": Fault(processes.node_lost),
        "node_joins_and_leaves": Fault(processes.node_joins_and_leaves, 3),
        "cluster_lost": Fault(processes.cluster_lost),
        "disk_full": Fault(storage.disk_full),
        "scratch_full": Fault(partial(storage.scratch_full, bucket=bucket)),
        "store_cut_off": Fault(partial(storage.store_unreachable, bucket=bucket, how="reset")),
        "store_silent": Fault(partial(storage.store_unreachable, bucket=bucket, how="silent")),
        "source_failing": Fault(partial(storage.source_failing, bucket=bucket)),
        "source_short": Fault(partial(storage.source_short, bucket=bucket)),
        "file_replaced": Fault(storage.file_replaced),
        "file_deleted": Fault(storage.file_deleted),
        "two_jobs_on_one_cluster": Fault(storage.two_jobs_on_one_cluster),
        "two_jobs_on_two_clusters": Fault(storage.two_jobs_on_two_clusters),
        "answered_and_maintained": Fault(storage.answered_and_maintained),
        "shard_damaged": Fault(rot.shard_damaged),
        "footer_rot_tokens": Fault(partial(rot.footer_rot, table="tokens")),
        "footer_rot_segments": Fault(partial(rot.footer_rot, table="segments")),
        "footer_rot_videos": Fault(partial(rot.footer_rot, table="videos")),
        "clock_a_day_ahead": Fault(partial(clock.clock_ahead, days=1)),
        "clock_a_year_ahead": Fault(partial(clock.clock_ahead, days=365)),
    }


def measure(world: RealWorld, folder: Path) -> None:
    """An undisturbed run: how long there is to hurt one, and that all is well without faults."""
    folder.mkdir()
    trial = Trial.of(world, folder)
    driver = trial.index()
    moments = []
    for table in ("recipes", "videos", "runs"):
        if not trial.await_commit(driver, table):
            raise RuntimeError(f"a run without faults ended early: {driver.end()}")
        moments.append(time.monotonic())
    world.work_s, world.commits_s = moments[1] - moments[0], moments[2] - moments[1]
    trial.go_on([driver.end()])
    world.tokens = trial.look().tokens
    if trial.broken or trial.lost or trial.doubled:
        raise RuntimeError(f"a run without faults: {trial.broken} {trial.lost} {trial.doubled}")


def endure(world: RealWorld, fault: Fault, folder: Path) -> Trial:
    """Run one trial from beginning to end."""
    folder.mkdir()
    trial = Trial.of(world, folder)
    try:
        if ended := fault.inflict(trial):
            trial.go_on(ended)
    except HungError as error:
        trial.hung = True
        trial.broken.append(str(error))
        world.head.stop()  # whatever is left of it
        world.head = Head()
    except MissedError as error:
        trial.broken.append(str(error))
    finally:
        for driver in trial.drivers:
            driver.kill()
    return trial


def print_kind(name: str, trials: list[Trial], seconds: float) -> None:
    """A line of the table, and what was not as it must be."""
    survived = sum(trial.survived for trial in trials)
    lost, doubled, hung = (sum(numbers) for numbers in zip(*(_losses(trial) for trial in trials), strict=True))
    right = sum(trial.second_pass_right is True for trial in trials)
    counts = f"{len(trials):6} {survived:9} {lost:5} {doubled:8} {hung:5} {right:12}"
    print(
        f"{name:31} {counts} {seconds:6.0f} s  {'; '.join(note for trial in trials for note in trial.notes)}",
        flush=True,
    )
    for trial in trials:
        for problem in trial.broken:
            print(f"    {problem}", flush=True)


def _losses(trial: Trial) -> tuple[int, int, int]:
    return len(trial.lost), len(trial.doubled), trial.hung


def run_gauntlet(world: RealWorld, faults: dict[str, Fault]) -> dict[str, object]:
    """Run all trials of some faults; prints a line a kind and returns the summary."""
    heads = f"{'times':>6} {'survived':>9} {'lost':>5} {'doubled':>8} {'hung':>5} {'second pass':>12}"
    print(f"{'fault':31} {heads}", flush=True)
    trials: dict[str, list[Trial]] = {}
    skipped: dict[str, str] = {}
    started = time.monotonic()
    for name, fault in faults.items():
        kind_started = time.monotonic()
        try:
            trials[name] = [endure(world, fault, world.folder / f"{name}-{i}") for i in range(fault.times)]
        except SkippedError as reason:
            skipped[name] = str(reason)
            print(f"{name:31} not tried: {reason}", flush=True)
            continue
        print_kind(name, trials[name], time.monotonic() - kind_started)
    every = [trial for some in trials.values() for trial in some]
    lost, doubled, hung = (sum(_losses(trial)[i] for trial in every) for i in range(3))
    return {
        "faults": len(trials),
        "times": len(every),
        "survived": sum(trial.survived for trial in every),
        "lost": lost,
        "duplicated": doubled,
        "hung": hung,
        "second_passes_right": sum(trial.second_pass_right is True for trial in every),
        "driver_kills": sum(len(some) for name, some in trials.items() if name.startswith("driver_killed")),
        "worker_kills": sum(
            len(some) for name, some in trials.items() if name.endswith("er_killed") or name == "child_killed"
        ),
        "videos": len(world.corpus.names),
        "notes": {name: [note for trial in some for note in trial.notes] for name, some in trials.items()},
        "skipped": skipped,
        "wall_s": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Make the world, hurt it, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="only these kinds of fault, by their names in the table"
    )
    parser.add_argument("--times", type=int, help="how often each is tried; default: as the table says")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the clusters would outlive us
    with tempfile.TemporaryDirectory(prefix="longvlm-faults-") as folder, FaultyBucket(rng) as bucket:
        os.environ["TMPDIR"] = folder  # of drivers and workers: the scratch of those that are killed stays behind
        world = make_world(Path(folder), options.videos, rng)
        try:
            measure(world, Path(folder) / "undisturbed")
            faults = all_faults(bucket)
            chosen = {name: faults[name] for name in options.only or faults}
            if options.times:
                chosen = {name: Fault(fault.inflict, options.times) for name, fault in chosen.items()}
            result = run_gauntlet(world, chosen)
        finally:
            world.head.stop()
    print(json.dumps(result))
    if result["survived"] != result["times"]:
        sys.exit(1)
