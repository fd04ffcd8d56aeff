"""Faults of sleep: processes that are stopped in the middle of a run, and perhaps go on days later."""

import os
import signal
import time
from pathlib import Path

import psutil

from benchmarks.faults.trial import MissedError, Trial
from benchmarks.faults.world import Driver, Ended
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.uncommitted import SHARDED

_LONG_S = 10.0  # that a run takes longer, so that it is under way when it is hurt
_ASLEEP_H = 72.0  # longer than what nobody names is kept
_NUM_SHARDS = 2  # that wait to be committed when the driver falls asleep, at least
_SETTLE_S = 2.0  # in which what is being written is closed
_NUM_FORGOTTEN = 2
_STALL_S = 40.0  # in place of half an hour; a busy machine takes half of that to start its workers
_MAX_HOURS = 40 / 3600
_ENDS_S = 30.0  # after that, at the latest


def driver_asleep_past_retention(trial: Trial) -> list[Ended]:
    """The driver sleeps for three days, in which `forget` and `maintain` take the shards that it has not committed.

    It is stopped for as long as these work, and the files that it left age meanwhile as in three days.
    """
    forgotten = sorted(trial.num_frames)[:_NUM_FORGOTTEN]
    half = str(len(trial.num_frames) // 2)
    first = trial.index("--limit", half, poison=dict.fromkeys(forgotten, "crash")).end()
    trial.check_counts(first, trial.look())
    trial.retried = {"decoder_crashed"}
    driver = trial.index("--retry-failed", "decoder_crashed", slow=trial.slow_s(_LONG_S), commits_every=3600)
    while driver.is_running() and len(_unnamed(trial)) < 2 * _NUM_SHARDS:
        time.sleep(0.05)
    if not driver.signal(signal.SIGSTOP):
        raise MissedError("the run ended before it fell asleep")
    time.sleep(_SETTLE_S)
    try:
        left = _unnamed(trial)
        _age(left, _ASLEEP_H)
        uris = [argument for name in forgotten for argument in ("--uri", f"{trial.source}/{name}")]
        others = [trial.start("forget", *uris, "--yes", "--json").end(), trial.start("maintain", "--json").end()]
    finally:
        driver.signal(signal.SIGCONT)
    by_forget, by_maintain = (others[0].counts or {}).get("files_deleted", 0), (others[1].counts or {}).get("files", 0)
    for one in others:
        trial.expect(holds=one.code == 0, otherwise=f"exit {one.code}, {one.counts}: {one.said[-300:]}")
    trial.expect(holds=by_forget > 0, otherwise=f"forget took nothing: {others[0].counts}")
    trial.expect(holds=not any(path.exists() for path in left), otherwise="maintain left what was too old")
    trial.forgotten = {*forgotten}
    ended = driver.end()
    trial.notes.append(f"of {len(left)} files forget took {by_forget}, maintain {by_maintain}; exit {ended.code}")
    trial.expect(holds=ended.code == 0, otherwise=f"exit {ended.code}: {ended.said[-300:]}")
    return [ended]


def _unnamed(trial: Trial) -> list[Path]:
    """Closed shards that no log names."""
    store = Store.open(trial.store)
    named = {file.uri for table in store.pin(SHARDED).tables.values() for file in table.files}
    return [path for table in SHARDED for path in Path(trial.store, table).glob("*.parquet") if str(path) not in named]


def _age(paths: list[Path], hours: float) -> None:
    for path in paths:
        then = path.stat().st_mtime - hours * 3600
        os.utime(path, (then, then))


def encoder_stopped_stall(trial: Trial) -> list[Ended]:
    """The encoder is stopped and nothing else ends the run: it does so itself when nothing has moved for long."""
    driver = trial.index(slow=trial.slow_s(_LONG_S), stall=_STALL_S)
    ended = _stop_encoder(trial, driver, _STALL_S + _ENDS_S)
    stopped = str((ended.counts or {}).get("stopped"))
    is_said = ended.code == 1 and "nothing has moved" in stopped and "encode" in stopped
    trial.expect(holds=is_said, otherwise=f"exit {ended.code}, {ended.counts}: {ended.said[-300:]}")
    return [ended]


def encoder_stopped_max_hours(trial: Trial) -> list[Ended]:
    """The encoder is stopped, and the time of the run ends meanwhile."""
    driver = trial.index("--max-hours", str(_MAX_HOURS), slow=trial.slow_s(3 * _LONG_S))
    ended = _stop_encoder(trial, driver, _MAX_HOURS * 3600 + _ENDS_S)
    counts = ended.counts or {}
    is_said = ended.code == 0 and counts.get("stopped") is None and counts.get("not_attempted", 0) > 0
    trial.expect(holds=is_said, otherwise=f"exit {ended.code}, {ended.counts}: {ended.said[-300:]}")
    return [ended]


def _stop_encoder(trial: Trial, driver: Driver, deadline_s: float) -> Ended:
    """Stop the encoder of a run after a commit, and wait for the run's end; the encoder must be gone with it."""
    if not trial.await_commit(driver, "videos"):
        raise MissedError("the run ended before it was hurt")
    encoders = trial.world.head.workers("MapBatches(Encode)")
    for process in encoders:
        process.suspend()
    started = time.monotonic()
    ended = driver.end(deadline_s)
    trial.notes.append(f"ended {time.monotonic() - started:.0f} s later, exit {ended.code}")
    _, alive = psutil.wait_procs(encoders, timeout=_ENDS_S)
    trial.expect(holds=bool(encoders) and not alive, otherwise=f"{len(alive)} of {len(encoders)} encoders are left")
    for process in alive:
        process.kill()
    return ended
