"""A cluster that goes while a driver waits for it is told in a sentence, and what was finished is kept."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from journey import ONE_CORE

from longvlm.jobs.cluster import watch as watch_module
from longvlm.jobs.cluster.executor import OutOfTimeError
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.cluster.watch import ClusterLostError, ClusterWatch
from support import stray_folder


@pytest.fixture
def door():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def sigterm():
    """As `connect` leaves it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm")
def test_a_driver_that_waits_for_a_cluster_that_is_gone_is_woken(door):
    watch = ClusterWatch({"GCS": (door.getsockname(), 0.0)})
    results = queue.Queue()
    results.put("a block")
    waited = watch.wait_for(iter(results.get, None))
    assert watch.look() is None
    assert next(waited) == "a block"
    door.close()
    looker = threading.Thread(target=watch.keep_looking)
    looker.start()
    with pytest.raises(ClusterLostError, match=r"its GCS at 127.0.0.1:\d+ is gone \(Connection refused\)"):
        next(waited)
    looker.join()
    with pytest.raises(ClusterLostError):
        next(watch.wait_for(iter(results.get, None)))


def test_what_may_come_back_is_waited_for(door):
    watch = ClusterWatch({"GCS": (door.getsockname(), 60.0)})
    door.close()
    assert watch.look() is None


@pytest.mark.usefixtures("sigterm")
def test_a_wait_ends_when_the_time_is_over_though_nothing_comes(door):
    watch = ClusterWatch({"GCS": (door.getsockname(), 60.0)}, ends_s=time.time())
    looker = threading.Thread(target=watch.keep_looking)
    looker.start()
    with pytest.raises(OutOfTimeError):
        next(watch.wait_for(iter(queue.Queue().get, None)))
    looker.join()


@pytest.mark.usefixtures("sigterm")
def test_a_wait_ends_when_nothing_moves_and_says_where_work_is_held(door, monkeypatch):
    monkeypatch.setattr(watch_module, "_STALL_POLL_S", 0.0)
    tally = Tally()
    tally.begin("decode", ["a"], "node-1:7")
    tally.finish("decode", ["a"], worker="node-1:7", busy_s=1.0, cpu_s=1.0)
    tally.begin("encode", ["a", "b"], "node-2:8")
    tally.moved_s -= 1799.0
    watch = ClusterWatch({"GCS": (door.getsockname(), 60.0)}, stall=tally.stall)
    watch._awake_since_s -= 3600.0
    assert watch.look_at_stages() is None
    tally.moved_s -= 10.0
    looker = threading.Thread(target=watch.keep_looking)
    looker.start()
    with pytest.raises(ClusterLostError, match=r"nothing has moved for 30 minutes; at work: encode in node-2:8 \(2\)"):
        next(watch.wait_for(iter(queue.Queue().get, None)))
    looker.join()


def test_a_stall_tells_how_far_the_stages_are_where_no_worker_holds_anything():
    tally = Tally()
    assert tally.stall()[1] == "no stage has begun anything"
    for stage in ("decode", "encode"):
        tally.begin(stage, ["a"], "node-1:7")
        tally.finish(stage, ["a"], worker="node-1:7", busy_s=1.0, cpu_s=1.0)
    assert tally.stall()[1] == "no worker holds anything; done so far: decode 1, encode 1"


def test_a_driver_that_was_asleep_itself_gives_the_stages_time_to_go_on(monkeypatch):
    monkeypatch.setattr(watch_module, "_STALL_POLL_S", 0.0)
    watch = ClusterWatch({}, stall=lambda: (7200.0, "encode in node-2:8 (2)"))
    watch._looked_s -= 7200.0
    assert watch.look_at_stages() is None
    watch._awake_since_s -= 1801.0  # and they do not
    assert "nothing has moved for 120 minutes" in watch.look_at_stages()


@pytest.mark.usefixtures("sigterm")
def test_ctrl_c_is_no_lost_cluster(door):
    watch = ClusterWatch({"GCS": (door.getsockname(), 60.0)})
    threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        next(watch.wait_for(iter(queue.Queue().get, None)))


def test_a_run_whose_gcs_is_killed_keeps_what_was_finished(tmp_path, clips, model):
    """Just when it gives back its turn; in a folder with Python files of somebody's own, which no worker takes."""
    source, store = tmp_path / "clips", tmp_path / "store"
    source.mkdir()
    for i in range(300):
        os.link(clips / f"clip-{i % 12:02}.mp4", source / f"{i:03}.mp4")
    code = f"""
import signal, sys
import psutil
import ray
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
from longvlm.jobs.cli import main
from longvlm.jobs.cluster import ray_executor, watch
watch._GCS_PATIENCE_S = 0.5
plain = ray_executor.StartTurn.give_back
def give_back(turn):
    for child in psutil.Process().children():
        if child.name() == "gcs_server":
            child.kill()
    plain(turn)
ray_executor.StartTurn.give_back = give_back
try:
    main(["index", {str(source)!r}, "--store", {str(store)!r}, "--model", {model!r}, "--recipe", "tiny", "--json"])
finally:
    assert not {{"torch", "transformers"}} & {{*sys.modules}}  # whose seconds are for workers that encode
    try:
        ray.get(ray.put(1))  # as whoever shows how far the run is may ask meanwhile
    except ray.exceptions.RaySystemError:
        assert not ray.is_initialized()
"""
    script, folder = tmp_path / "driver.py", stray_folder(tmp_path / "own")
    script.write_text(code)
    options = {"cwd": folder, "env": {**os.environ, **ONE_CORE}, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, str(script)], check=False, **options)
    out, err = done.stdout, done.stderr
    assert done.returncode == 1, err
    told = json.loads(out.splitlines()[-1])
    assert told["stopped"].startswith("the Ray cluster was lost: its GCS at ")
    assert told["indexed"] > 0
    assert told["indexed"] + told["not_attempted"] == told["listed"] == 300
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert "--ray-address" not in err
    assert "Traceback" not in err
    assert "stray" not in err
