import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from longvlm.pipeline.store import lease
from longvlm.pipeline.store.lease import Lease, LeaseHeldError, newest
from longvlm.schemas.errors import InputError
from support import ROOT

TAKE = """
import sys
from longvlm.pipeline.store.lease import Lease, LeaseHeldError

store, expiry_s = sys.argv[1], float(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lease(store, "nightly", lambda: None, expiry_s=expiry_s):
        print("held", flush=True)
        sys.stdin.readline()
except LeaseHeldError as error:
    print(error.claim.host, flush=True)
"""


def take(store, name="nightly", *, expiry_s=900.0, on_loss=lambda: None):
    return Lease(str(store), name, on_loss, expiry_s=expiry_s)


def processes(store, number, expiry_s=900.0):
    """So many processes that wait to be told to take the lease."""
    command = [sys.executable, "-c", TAKE, str(store), str(expiry_s)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(number)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    return started


def tell(process):
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "store"
    request.getfixturevalue("s3")
    return "s3://bucket/deep/store"


class ByHand:
    """The clock of a lease's keeper, by hand: each `turn` is time for a renewal."""

    def __init__(self, held):
        self._turns, self._ended = threading.Semaphore(0), held._ended
        self.waits_s = []  # for which it asked
        held._ended.wait = self._wait

    def turn(self, times=1):
        self._turns.release(times)

    def _wait(self, wait_s):
        self.waits_s.append(wait_s)
        while not self._turns.acquire(timeout=0.05):
            if self._ended.is_set():
                return True
        return False


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_at_a_time_and_free_again_afterwards(store):
    with take(store):
        with pytest.raises(LeaseHeldError, match="has the store until"), take(store):
            pass
        with take(store, "other"):
            pass
    with take(store):
        pass
    generation, claim = newest(f"{store}/leases/nightly")
    assert (generation, claim.until_s) == (4, 0.0)


def test_of_many_processes_exactly_one_gets_it(store):
    racers = processes(store, 3 if isinstance(store, Path) else 2)
    try:
        for racer in racers:
            tell(racer)
        said = [racer.stdout.readline() for racer in racers]
        assert said.count("held\n") == 1
        assert "" not in said
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()


def test_of_many_threads_exactly_one_takes_over_what_has_expired(store):
    rounds, racers = (10, 8) if isinstance(store, Path) else (4, 5)
    start = threading.Barrier(racers)

    def race(_):
        start.wait()
        try:
            return take(store)._take()
        except LeaseHeldError as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        for _ in range(rounds):
            won = [outcome for outcome in pool.map(race, range(racers)) if outcome is None]
            assert len(won) == 1
            expire(store)


def expire(store):
    """As if the holder had been killed a while ago."""
    folder = f"{store}/leases/nightly"
    generation, claim = newest(folder)
    fs, path = lease.filesystem(lease._path(folder, generation))
    fs.pipe_file(path, json.dumps({**vars(claim), "expiry_s": 0.0}).encode())


def test_a_holder_that_is_killed_keeps_others_away_only_for_a_while(tmp_path):
    store = tmp_path / "store"
    (holder,) = processes(store, 1)
    tell(holder)
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with pytest.raises(LeaseHeldError), take(store):
        pass
    assert newest(f"{store}/leases/nightly")[1].until_s <= time.time() + 900.0
    expire(store)
    with take(store):
        pass


@pytest.mark.parametrize("off_s", [-366 * 86_400.0, 366 * 86_400.0], ids=["behind", "ahead"])
def test_a_holder_whose_clock_is_off_by_a_year_keeps_others_away_as_long_as_any(store, monkeypatch, off_s):
    with monkeypatch.context() as patch:
        there_s = time.time() + off_s
        patch.setattr(lease.clock, "time_ns", lambda: int(there_s * 1e9))
        take(store)._take()
    with pytest.raises(LeaseHeldError), take(store):
        pass
    monkeypatch.setattr(lease, "_age_s", lambda *_: 901.0)
    with take(store):
        pass


def test_the_age_of_a_claim_is_told_by_the_stores_clock(store):
    take(store)._take()
    assert 0.0 <= lease._age_s(f"{store}/leases/nightly", 1) < 60.0
    assert lease._age_s(f"{store}/leases/nightly", 7) == 0.0  # there is none any more
    if isinstance(store, Path):
        os.utime(store / "leases/nightly/000000001.json", (time.time() - 1000,) * 2)
        assert 900.0 < lease._age_s(f"{store}/leases/nightly", 1) < 1100.0
        with take(store):
            pass
        assert not list(store.glob("leases/nightly/*.draft"))


def test_a_claim_that_was_cut_off_does_not_lock_others_out_for_good(store, monkeypatch):
    take(store)._take()
    fs, path = lease.filesystem(f"{store}/leases/nightly/000000001.json")
    for content in (b"", b'{"holder": "x", "ho', b"[]", b"\0" * 50):
        fs.pipe_file(path, content)
        with pytest.raises(LeaseHeldError, match="cannot be read"), take(store):
            pass
    monkeypatch.setattr(lease, "_age_s", lambda *_: 901.0)
    with take(store):
        pass


def test_it_is_renewed_as_long_as_it_is_held(store):
    held = take(store)
    clock = ByHand(held)
    with held:
        expire(store)  # so that only a renewal keeps others away
        clock.turn()
        until(lambda: held._generation == 2)
        with pytest.raises(LeaseHeldError), take(store):
            pass
        clock.turn(2)
        until(lambda: held._generation == 4)
        assert held.lost is None
        assert set(clock.waits_s) == {lease.EXPIRY_S / 3}
        fs, folder = lease.filesystem(held.folder)
        fs.invalidate_cache()
        assert len(fs.ls(folder)) <= 2  # a renewal may be under way


def test_who_slept_too_long_learns_that_another_took_over(store):
    lost = threading.Event()
    sleeper = take(store, on_loss=lost.set)
    clock = ByHand(sleeper)
    with sleeper:
        expire(store)
        with take(store) as other:
            clock.turn()
            assert lost.wait(10)
            assert "another run took over" in sleeper.lost
            assert other.lost is None
    assert newest(other.folder)[1].until_s == 0.0


def test_who_fell_asleep_between_looking_and_creating_takes_nothing(store):
    """The next generation was created, renewed and removed meanwhile, so that its name is free again."""
    with take(store, expiry_s=900) as first:
        pass
    sleeper = take(store)
    sleeper._generation, _ = newest(first.folder)
    with take(store) as awake:
        assert awake._advance(time.time() + 900)
        assert awake._advance(time.time() + 900)
        assert not sleeper._advance(time.time() + 900)
        assert newest(awake.folder)[1].holder == awake._claim.holder


def test_an_answer_that_did_not_come_through_does_not_lose_it(store, monkeypatch):
    """The object was created, but the client was told otherwise."""
    with take(store) as held:
        really_create = lease.create

        def create(uri, content):
            really_create(uri, content)
            monkeypatch.undo()
            raise TimeoutError

        monkeypatch.setattr(lease, "create", create)
        with pytest.raises(TimeoutError):
            held._advance(time.time() + 900)
        assert held._advance(time.time() + 900)
        assert held.lost is None


def test_a_store_out_of_reach_is_borne_until_the_lease_has_run_out(store, monkeypatch):
    failed = threading.Semaphore(0)

    def fail(*_):
        failed.release()
        raise OSError("the store is out of reach")

    lost = threading.Event()
    held = take(store, on_loss=lost.set)
    clock = ByHand(held)
    with held:
        monkeypatch.setattr(lease, "create", fail)
        clock.turn(2)
        assert failed.acquire(timeout=10)
        assert failed.acquire(timeout=10)  # the first failure was borne
        assert not lost.is_set()
        assert clock.waits_s[:2] == [lease.EXPIRY_S / 3, lease._RETRY_S]
        held._claim = replace(held._claim, until_s=time.time() - 1)
        clock.turn()
        assert lost.wait(10)
        assert "out of reach" in held.lost


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no lease can be taken"), take(tmp_path / "file"):
        pass
