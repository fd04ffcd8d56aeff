"""Jobs sent to a Ray head of their own, which wants a token."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from benchmarks.faults.world import Head
from clips import write_clip
from longvlm.jobs.cli import main
from longvlm.jobs.operate.submit import JobSubmission, SubmittedJob, read_env
from longvlm.schemas.errors import InputError
from support import ROOT, stray_folder

START_S = 120


def free_ports(number):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    """A head that wants a token, beside the session's local Ray: all its ports and its folder are its own."""
    names = ("dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "runtime-env-agent-port", "node-manager-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # where a job finds its python
        with Head(3, "--include-dashboard=true", *(f"--{name}={port}" for name, port in ports.items())) as head:
            env = {**os.environ, **head.env}
            del env["RAY_ADDRESS"]
            wait_for(address, head.env["RAY_AUTH_TOKEN"])
            yield SimpleNamespace(address=address, env=env)


def wait_for(address, token):
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, "no dashboard came up"
            time.sleep(0.2)


def submit(cluster, job, *args, **env):
    command = [sys.executable, "-m", "longvlm", "submit", job, *map(str, args), "--address", cluster.address]
    return subprocess.run(
        command, env=cluster.env | env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400
    )


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory, model):
    """An index job that has ended: a video with a name for a shell, in a folder with somebody's own Python."""
    folder = stray_folder(tmp_path_factory.mktemp("sent") / "own")
    (folder / "my clips").mkdir()
    write_clip(folder / "my clips" / "a $(touch hacked); '.mp4", 25)
    args = ("my clips", "--store", folder.parent / "store", "--model", model, "--recipe", "tiny", "--json")
    args += ("--env", "SECRET=do-not-print", "--include", "* $(touch hacked); *")
    return submit(cluster, "index", *args, "--working-dir", folder)


def test_a_job_runs_over_there_and_its_log_and_exit_code_come_back(submitted, cluster, tmp_path):
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (line,) = [line for line in submitted.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["indexed"] == 1
    assert "ray job stop" in submitted.stderr
    assert "do-not-print" not in submitted.stdout + submitted.stderr
    assert "INFO" not in submitted.stdout + submitted.stderr  # of Ray's
    wrong = submit(cluster, "maintain", "--store", tmp_path / "nowhere")
    assert wrong.returncode == 2
    assert "there is no store at" in wrong.stdout


def test_a_job_need_not_be_waited_for(cluster, tmp_path):
    done = submit(cluster, "maintain", "--store", tmp_path / "none", "--no-wait")
    assert done.returncode == 0
    assert done.stdout == ""
    assert "is on its way" in done.stderr


def test_a_folder_that_is_sent_along_is_data_and_no_code(submitted):
    """Paths count from there; modules with the names of our folders, of Python's or of PyTorch are not run."""
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    (line,) = [line for line in submitted.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["listed"] == json.loads(line)["indexed"] == 1
    assert "stray" not in submitted.stdout + submitted.stderr


def test_ctrl_c_leaves_the_job_alone(cluster, tmp_path):
    command = [sys.executable, "-m", "longvlm", "submit", "maintain", "--store", str(tmp_path / "none")]
    command += ["--address", cluster.address, "--quiet"]
    waiting = subprocess.Popen(command, env=cluster.env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = waiting.stderr.readline()
    assert "is on its way" in said
    waiting.send_signal(signal.SIGINT)
    _, rest = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert "the job goes on" in rest


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "wants a token and refuses this one"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token and got none (RAY_AUTH_MODE is disabled here, so none is sent)"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nowhere"}, "wants a token and got none; set RAY_AUTH_MODE=token"),
    ],
    ids=["another token", "not sent", "none"],
)
def test_a_wrong_token_is_a_sentence(cluster, tmp_path, env, says):
    done = submit(cluster, "maintain", "--store", tmp_path / "store", "--quiet", **env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["maintain", "--store", "s", "--verfy"], "No such option"),
        (["maintain"], "Missing option '--store'"),
        (["doctor", "x", "--store", "s"], "is not one of"),
        (["maintain", "--store", "s", "--env", "A B=secret"], "--env takes NAME=VALUE"),
        (["maintain", "--store", "s", "--env", "NOT_SET_HERE"], "NOT_SET_HERE has no value"),
        (["maintain", "--store", "s", "--working-dir", "nowhere"], "--working-dir nowhere"),
        (["maintain", "--store", "s"], "no Ray dashboard answers"),
    ],
)
def test_wrong_input_is_told_before_anything_is_sent(args, says):
    (port,) = free_ports(1)
    done = CliRunner().invoke(main, ["submit", *args, "--address", f"http://127.0.0.1:{port}"])
    assert done.exit_code == 2
    assert says in done.stderr
    assert "secret" not in done.stderr


def test_every_word_of_a_command_stays_one_word():
    order = JobSubmission(("answer", "--ask", "Who's there; $HOME?"), "http://head:8265", env={"A": "secret"})
    assert order.entrypoint == "python -I -m longvlm answer --ask 'Who'\"'\"'s there; $HOME?'"
    assert order.runtime_env() == {"env_vars": {"A": "secret"}}
    assert "secret" not in repr(order)


def test_settings_are_given_or_taken_from_here(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert read_env(("HERE", "THERE=c=d", "EMPTY=")) == {"HERE": "a=b", "THERE": "c=d", "EMPTY": ""}


def test_an_address_is_a_dashboard():
    from longvlm.jobs.operate.submit import submit_job

    with pytest.raises(InputError, match="http://HEAD:8265"):
        submit_job(JobSubmission(("maintain",), "ray://head:10001"))


RAYS = """2026-11-28 12:23:16,352\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job raysubmit_x: python -I -m longvlm index
2026-11-28 12:23:16,352\tERROR worker.py:1 -- A node died.
2026-11-28 12:23:17,352\tWARNING actor.py:9 -- Actors are """


class CutOff:
    """A cluster whose connections are cut off while a job says four words, and Ray some of its own."""

    def __init__(self):
        self.tails = 0

    async def tail_job_logs(self, _):
        self.tails += 1
        for word in ["one ", "two\n", RAYS, "thr", "ee\n", "four"][: 3 * self.tails]:
            yield word
        if self.tails == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, _):
        status = SimpleNamespace(is_terminal=lambda: self.tails > 1, value="SUCCEEDED")
        return SimpleNamespace(status=status, driver_exit_code=0, message="fine")


def test_a_log_that_is_cut_off_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr("longvlm.jobs.operate.submit._RETRY_S", 0)
    said = []
    assert SubmittedJob(CutOff(), "job", "http://head").follow(said.append) == (0, "SUCCEEDED: fine")
    assert "".join(said) == "one two\n2026-11-28 12:23:16,352\tERROR worker.py:1 -- A node died.\nfour"
