"""Process faults: drivers, workers, decoders' children, nodes and clusters that die, hang or swell."""

import os
import signal
import time
from collections.abc import Callable

import psutil

from benchmarks.faults.trial import MissedError, Trial
from benchmarks.faults.world import CHILD_MARK, STAGE_MARKS, Driver, Ended, Head, command_of, descendants, kill_tree

_TRIES = 5  # to hit a run before it ends
_LONG_S = 5.0  # that a run takes longer, so that there is time to hit it
_GROWING_S = 60.0  # that a run takes longer, so that a node may join it
_POLL_S = 0.05
_NUM_POISONED = 2
_RAY_ENDS_S = 30.0  # after its driver


def wait_for_moment(trial: Trial, driver: Driver, *, committed: bool) -> bool:
    """Until a random moment of the run's work, before or after its first commit; False if it ended before."""
    world = trial.world
    if not trial.await_commit(driver, "videos" if committed else "recipes"):
        return False
    time.sleep(world.rng.uniform(0, 0.9 * (world.commits_s if committed else world.work_s)))
    return driver.is_running()


def hit(trial: Trial, number: int, *, committed: bool) -> list[Ended]:
    """Send a driver a signal at a random moment."""
    for _ in range(_TRIES):
        driver = trial.index()
        was_hit = wait_for_moment(trial, driver, committed=committed) and driver.signal(number)
        ended = driver.end()
        if was_hit and (ended.code or number == signal.SIGINT):
            return [ended]
        trial.start_over()
    raise MissedError("no run was hit before it ended")


def driver_killed_early(trial: Trial) -> list[Ended]:
    """SIGKILL before the first commit."""
    return hit(trial, signal.SIGKILL, committed=False)


def driver_killed_late(trial: Trial) -> list[Ended]:
    """SIGKILL after the first commit."""
    return hit(trial, signal.SIGKILL, committed=True)


def driver_killed_with_its_own_ray(trial: Trial) -> list[Ended]:
    """SIGKILL of a driver that had started a Ray of its own, of which no worker may be left."""
    for _ in range(_TRIES):
        driver = trial.index(env={"RAY_ADDRESS": "local"})
        if wait_for_moment(trial, driver, committed=True):
            below = descendants(driver.process)
            if driver.signal(signal.SIGKILL):
                _, alive = psutil.wait_procs(below, timeout=_RAY_ENDS_S)
                ours = [p for p in alive if any(mark in command_of(p) for mark in (*STAGE_MARKS, CHILD_MARK))]
                trial.expect(holds=not ours, otherwise=f"left running: {[command_of(p) for p in ours]}")
                if alive:
                    trial.notes.append(f"left of its Ray: {', '.join(command_of(p)[:30] for p in alive)}")
                for process in alive:
                    kill_tree(process)
                return [driver.end()]
        driver.end()
        trial.start_over()
    raise MissedError("no run was hit before it ended")


def driver_interrupted(trial: Trial) -> list[Ended]:
    """Ctrl-C: what was finished is committed, and the exit code is 1."""
    (ended,) = hit(trial, signal.SIGINT, committed=True)
    is_said = ended.code == 1 and (ended.counts or {}).get("stopped") == "interrupted"
    trial.expect(holds=is_said, otherwise=f"Ctrl-C: exit {ended.code}, {ended.counts}, {ended.said[-300:]}")
    return [ended]


def driver_terminated(trial: Trial) -> list[Ended]:
    """SIGTERM, as a cluster sends it before it takes a machine away."""
    (ended,) = hit(trial, signal.SIGTERM, committed=True)
    trial.notes.append(f"exit {ended.code}, {'counts' if ended.counts else 'no counts'}")
    return [ended]


def driver_killed_between_commits(trial: Trial) -> list[Ended]:
    """SIGKILL when tokens and segments are committed, and the rows that make them exist are not."""
    ended = trial.index(dies_between_commits=2, commits_every=0).end()
    trial.expect(holds=ended.code == -signal.SIGKILL, otherwise=f"the driver was not killed: exit {ended.code}")
    return [ended]


def worker_killed(trial: Trial, mark: str) -> list[Ended]:
    """SIGKILL of a process of the run; the run itself goes on to its end."""
    for _ in range(_TRIES):
        driver = trial.index(slow=trial.slow_s(_LONG_S))
        wait_for_moment(trial, driver, committed=trial.world.rng.random() < 0.5)
        while driver.is_running() and not (found := trial.world.head.workers(mark)):
            time.sleep(0.01)
        if driver.is_running():
            process = trial.world.rng.choice(found)
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                found = []
            ended = driver.end()
            if found:
                trial.expect(holds=ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
                return [ended]
        driver.end()
        trial.start_over()
    raise MissedError("no run was hit before it ended")


def decoder_killed(trial: Trial) -> list[Ended]:
    """SIGKILL of a decoder."""
    return worker_killed(trial, "MapBatches(Watch)")


def encoder_killed(trial: Trial) -> list[Ended]:
    """SIGKILL of the encoder."""
    return worker_killed(trial, "MapBatches(Encode)")


def writer_killed(trial: Trial) -> list[Ended]:
    """SIGKILL of the writer."""
    return worker_killed(trial, "MapBatches(Write)")


def child_killed(trial: Trial) -> list[Ended]:
    """SIGKILL of a decoder's child, as by the kernel when memory runs out: costs the video it held, for once."""
    trial.retried = {"decoder_crashed"}
    ended = worker_killed(trial, CHILD_MARK)
    crashed = (ended[0].counts or {}).get("failures", {}).get("decoder_crashed", 0)
    trial.expect(holds=crashed <= 1, otherwise=f"{crashed} videos failed for one child")
    return ended


def encoder_dies_in_batch(trial: Trial) -> list[Ended]:
    """The encoder dies in the middle of a batch."""
    marker = trial.folder / "died"
    ended = trial.index(encoder_dies=str(marker)).end()
    trial.expect(holds=marker.exists() and ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
    return [ended]


def poisoned(call: str, code: str) -> Callable[[Trial], list[Ended]]:
    """A fault of some videos that do a thing to their decoder; they fail with a code, and nothing else does."""

    def inflict(trial: Trial) -> list[Ended]:
        names = trial.world.rng.sample(sorted(trial.num_frames), _NUM_POISONED)
        ended = trial.index(poison=dict.fromkeys(names, call)).end()
        failures = (ended.counts or {}).get("failures", {})
        is_right = ended.code == 0 and failures.get(code) == _NUM_POISONED
        trial.expect(holds=is_right, otherwise=f"exit {ended.code}, {failures}: {ended.said[-300:]}")
        trial.retried = {code}
        return [ended]

    return inflict


def node_lost(trial: Trial) -> list[Ended]:
    """A second node is there when the run begins, and gone in the middle of it."""
    head = trial.world.head
    node = head.add_node()
    try:
        driver = trial.index(slow=trial.slow_s(2 * _LONG_S))
        trial.await_commit(driver, "videos")
        trial.expect(holds=driver.is_running(), otherwise="the run ended before the node was lost")
        kill_tree(node)
        ended = driver.end()
    finally:
        kill_tree(node)
        head.processes.remove(node)
    trial.expect(holds=ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
    return [ended]


def node_joins_and_leaves(trial: Trial) -> list[Ended]:
    """A node joins in the middle of the run, decodes, and is taken away as Kubernetes does: SIGTERM."""
    head, noted = trial.world.head, trial.folder / "nodes"
    noted.mkdir()
    driver = trial.index(slow=trial.slow_s(_GROWING_S), nodes_noted=str(noted))
    trial.await_commit(driver, "videos")
    started_s = time.monotonic()
    node = head.add_node()
    joined_s = time.monotonic()
    try:
        while driver.is_running() and len(list(noted.iterdir())) < 2:
            time.sleep(_POLL_S)
        trial.expect(holds=driver.is_running(), otherwise="the run ended before the node decoded")
        now_s = time.monotonic()
        trial.notes.append(
            f"{now_s - joined_s:.1f} s from joining to decoded frames ({now_s - started_s:.1f} from its start)"
        )
        node.terminate()
        ended = driver.end()
    finally:
        kill_tree(node)
        head.processes.remove(node)
    trial.expect(holds=ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
    return [ended]


def cluster_lost(trial: Trial) -> list[Ended]:
    """The whole cluster is gone in the middle of the run; the driver says so, and another cluster goes on."""
    with Head() as head:
        driver = trial.index(env=head.env, slow=trial.slow_s(_LONG_S))
        wait_for_moment(trial, driver, committed=True)
        head.stop()
        ended = driver.end()
    trial.notes.append(f"exit {ended.code}")
    trial.expect(holds=ended.code != 0, otherwise="the run did not notice")
    return [ended]
