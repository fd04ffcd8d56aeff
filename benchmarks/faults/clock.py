"""Faults of clocks: a process whose clock is far ahead of all others, and of the store's."""

import os
import signal
import time
from pathlib import Path

from benchmarks.faults.trial import MissedError, SkippedError, Trial
from benchmarks.faults.world import Ended
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.store.lease import EXPIRY_S

_LIBRARY = "*/faketime/libfaketimeMT.so.1"  # of Debian's package faketime
_OURS = {"RAY_ADDRESS": IN_PROCESS}
_NUM_FAILED = 2
_LONG_S = 10.0  # that a run takes longer, so that it is under way when it is hurt


def ahead(days: int) -> dict[str, str]:
    """The environment of a process without Ray whose clock is ahead, but not that of its disk, as of a share."""
    found = sorted(Path("/usr/lib").glob(_LIBRARY))
    if not found:
        raise SkippedError("a clock that is ahead needs libfaketime (apt-get install faketime)")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": f"+{days}d",
        "NO_FAKE_STAT": "1",
        "FAKETIME_DISABLE_SHM": "1",
        **_OURS,
    }


def clock_ahead(trial: Trial, days: int) -> list[Ended]:
    """A night whose clock is ahead fails some videos and is killed; a maintenance with that clock comes after it.

    Its lease must run out by the store's clock, and what it says failed must not outlive what is right.
    """
    env = ahead(days)
    night = ("nightly", trial.source, "--json")
    failing = sorted(trial.num_frames)[1 : 1 + _NUM_FAILED]
    begun = trial.index("--limit", "1", env=_OURS).end()
    driver = trial.start(*night, env=env, slow=trial.slow_s(_LONG_S), poison=dict.fromkeys(failing, "crash"))
    if not trial.await_commit(driver, "videos", 2) or not driver.signal(signal.SIGKILL):
        raise MissedError("the night ended before it was killed")
    killed = driver.end()
    maintained = trial.start("maintain", "--json", env=env).end()
    trial.expect(holds=maintained.code == 0, otherwise=f"exit {maintained.code}: {maintained.said[-300:]}")
    failed = {name for name, code in trial.look().failed.items() if code == "decoder_crashed"}
    trial.expect(holds=failed == {*failing}, otherwise=f"failed: {failed}")
    refused = trial.start(*night, env=_OURS).end()
    is_said = refused.code == 0 and "skipped" in (refused.counts or {})
    trial.expect(holds=is_said, otherwise=f"a lease that is held: exit {refused.code}, {refused.lines}")
    _wait_for_expiry(trial)
    ended = trial.start(*night, env=_OURS).end()
    trial.expect(holds=ended.code == 0, otherwise=f"the next night: exit {ended.code}, {ended.said[-300:]}")
    trial.retried = {"decoder_crashed"}
    return [begun, killed]


def _wait_for_expiry(trial: Trial) -> None:
    """Let the store's clock say that the newest claim was made as long ago as it holds."""
    then = time.time() - EXPIRY_S - 1
    for claim in Path(trial.store, "leases", "nightly").glob("*.json"):
        os.utime(claim, (then, then))
