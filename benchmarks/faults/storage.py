"""Storage faults: full disks, buckets out of reach or short of bytes, changes in the source, several jobs."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.faults.bucket import NAME, FaultyBucket
from benchmarks.faults.trial import SkippedError, Trial
from benchmarks.faults.world import Ended, Head, write_video

OUTAGE_S = 20.0
_LONG_S = 10.0  # that a run takes longer, so that it is under way when it is hurt
_FULL_KB, _ROOMY_KB = 256, 64 << 10
TOLD_SHORT = re.compile(
    r"in 3 tries: ([0-9]+ bytes came where [0-9]+ were listed|.*not enough data|.*did not match)", re.IGNORECASE
)
_CHANGED_SHARE = 20  # one video of so many


@contextmanager
def small_disk(folder: Path, num_kb: int) -> Iterator[None]:
    """A file system of its own at a folder; SkippedError where we may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_kb}k", "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:  # noqa: S603
        raise SkippedError("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607


def disk_full(trial: Trial) -> list[Ended]:
    """The store's disk is full in the middle of the run, and has room again when it is made again."""
    with small_disk(Path(trial.store), _FULL_KB):
        ended = trial.index().end()
        trial.notes.append(f"exit {ended.code}")
        is_said = ended.code == 1 and "o space left" in f"{ended.counts} {ended.said}"
        trial.expect(holds=is_said, otherwise=f"exit {ended.code}, {ended.counts}: {ended.said[-300:]}")
        resize = ["mount", "-o", f"remount,size={_ROOMY_KB}k", trial.store]
        subprocess.run(resize, check=True)  # noqa: S603
        trial.go_on([ended])
    return []


def scratch_full(trial: Trial, bucket: FaultyBucket) -> list[Ended]:
    """The disk for downloads is filled by somebody else in the middle of the run."""
    put_source(trial, bucket)
    folder = trial.folder / "scratch"
    with small_disk(folder, _ROOMY_KB):
        driver = trial.index(slow=trial.slow_s(_LONG_S), scratch=str(folder))
        trial.await_commit(driver, "videos")
        hog = folder / "hog"
        subprocess.run(["dd", "if=/dev/zero", f"of={hog}"], capture_output=True, check=False)  # noqa: S603, S607
        ended = driver.end()
        trial.notes.append(f"exit {ended.code}, {(ended.counts or {}).get('failures')}")
        trial.world.head.await_idle()
    trial.retried = {"too_large", "no_space"} & {*(ended.counts or {}).get("failures", {})}
    return [ended]


def put_source(trial: Trial, bucket: FaultyBucket) -> None:
    """Move the trial's source into the bucket."""
    prefix = f"{trial.folder.name}/videos"
    for path in Path(trial.source).iterdir():
        bucket.client.upload_file(str(path), NAME, f"{prefix}/{path.name}")
    trial.source = f"s3://{NAME}/{prefix}"


def store_unreachable(trial: Trial, bucket: FaultyBucket, how: Literal["reset", "silent"]) -> list[Ended]:
    """The bucket that holds the store is out of reach for a while: connections are cut, or nothing answers."""
    trial.store = f"s3://{NAME}/{trial.folder.name}/store"
    driver = trial.index(slow=trial.slow_s(_LONG_S))
    trial.await_commit(driver, "videos")
    bucket.outage, bucket.num_hurt = how, 0
    time.sleep(OUTAGE_S)
    bucket.outage = None
    ended = driver.end()
    trial.notes.append(f"{OUTAGE_S:.0f} s, {bucket.num_hurt} requests hurt, exit {ended.code}")
    return [ended]


def source_failing(trial: Trial, bucket: FaultyBucket) -> list[Ended]:
    """Half of all reads of videos from the bucket end in an error 500, a reset or a delay."""
    put_source(trial, bucket)
    bucket.trouble, bucket.num_hurt = 0.5, 0
    try:
        ended = trial.index().end()
    finally:
        bucket.trouble = 0.0
    failures = (ended.counts or {}).get("failures", {})
    trial.notes.append(f"{bucket.num_hurt} reads hurt, {failures.get('network', 0)} videos failed of it")
    trial.retried = {"network"}
    trial.expect(holds=ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
    return [ended]


def source_short(trial: Trial, bucket: FaultyBucket) -> list[Ended]:
    """Half of all reads of videos from the bucket end early, as a proxy's do, and half of these say so."""
    put_source(trial, bucket)
    bucket.short, bucket.num_hurt = 0.5, 0
    try:
        ended = trial.index().end()
    finally:
        bucket.short = 0.0
    errors = [error for name, error in trial.look().errors.items() if trial.known[name] == "network"]
    trial.notes.append(f"{bucket.num_hurt} reads cut, {len(errors)} videos failed of it")
    trial.retried = {"network"}
    wrong = [error for error in errors if not TOLD_SHORT.search(error)]
    trial.expect(holds=ended.code == 0 and not wrong, otherwise=f"exit {ended.code}, {wrong}: {ended.said[-300:]}")
    return [ended]


def last_names(trial: Trial) -> list[str]:
    """Good videos at the end of the order in which they are watched, so that they are not read yet."""
    return sorted(trial.num_frames)[-max(1, len(trial.num_frames) // _CHANGED_SHARE) :]


def file_replaced(trial: Trial) -> list[Ended]:
    """Files are replaced under their names between listing and reading: the next run sees that they changed."""
    driver = trial.index(slow=trial.slow_s(_LONG_S))
    trial.await_commit(driver, "videos")
    rng = np.random.default_rng(trial.world.rng.randrange(1 << 32))
    for name in last_names(trial):
        draft = trial.folder / name
        trial.num_frames[name] = write_video(draft, rng)
        draft.replace(Path(trial.source, name))
        trial.changed.add(name)
        trial.tokens.pop(name)
    return [driver.end()]


def file_deleted(trial: Trial) -> list[Ended]:
    """Files are deleted between listing and reading; the next run prunes them."""
    driver = trial.index(slow=trial.slow_s(_LONG_S))
    trial.await_commit(driver, "videos")
    deleted = last_names(trial)
    for name in deleted:
        Path(trial.source, name).unlink()
        del trial.num_frames[name]
    trial.flags = ["--prune"]
    ended = driver.end()
    num_missed = (ended.counts or {}).get("failures", {}).get("not_found", 0)
    is_right = ended.code == 0 and num_missed == len(deleted)
    trial.expect(holds=is_right, otherwise=f"exit {ended.code}, {num_missed} not found: {ended.said[-300:]}")
    return [ended]


def two_jobs_on_one_cluster(trial: Trial) -> list[Ended]:
    """Two index jobs over the same source into the same store, started together on one cluster."""
    drivers = [trial.index(), trial.index()]
    return _all_well(trial, [driver.end() for driver in drivers])


def two_jobs_on_two_clusters(trial: Trial) -> list[Ended]:
    """The same, each job on a cluster of its own."""
    with Head() as head:
        drivers = [trial.index(), trial.index(env=head.env)]
        return _all_well(trial, [driver.end() for driver in drivers])


def _all_well(trial: Trial, ended: list[Ended]) -> list[Ended]:
    for one in ended:
        trial.expect(holds=one.code == 0, otherwise=f"exit {one.code}: {one.said[-300:]}")
    return ended


def answered_and_maintained(trial: Trial) -> list[Ended]:
    """Questions are answered and the store is compacted and vacuumed, over and over, while a run indexes the rest."""
    half = str(len(trial.num_frames) // 2)
    first = trial.index("--limit", half).end()
    others = []
    with Head() as head:
        driver = trial.index(slow=trial.slow_s(_LONG_S))
        question = ["answer", "--ask", "What is red?", "--max-new-tokens", "2", "--json"]
        while driver.is_running():
            answering = trial.start(*question, env=head.env)
            while answering.is_running():
                others.append(trial.start("maintain", "--json").end())
            others.append(answering.end())
    if any("No such command" in one.said for one in others):
        raise SkippedError("there is no maintain")
    trial.notes.append(f"{len(others)} other jobs")
    return _all_well(trial, [first, driver.end(), *others])
