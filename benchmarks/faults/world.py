"""The test bed of the fault trials: a corpus of small videos, Ray heads to be killed, and drivers with deadlines."""

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from benchmarks.untrained_tower import DIM, build_untrained_tower
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.tinyworld.render import write_h264

DEADLINE_S = 300.0  # for a run of some 15 seconds, on a machine that may be busy: later than that it hangs
HEAD_START_S = 90.0
OBJECT_STORE_BYTES = 400 << 20
STAGE_MARKS = ("MapBatches(Watch)", "MapBatches(Encode)", "MapBatches(Write)", "MapBatches(Answerer)")
CHILD_MARK = "longvlm.pipeline.decode.isolate"
_BAD_EVERY = 20  # one file in so many is no video
_POLL_S = 0.02


class HungError(Exception):
    """A hang: something did not end in its time, and has been killed."""


@dataclass
class Corpus:
    """A corpus of small H.264 videos, each of another colour and length, and some files that are none."""

    folder: Path
    num_frames: dict[str, int] = field(default_factory=dict)  # of the good ones, by name
    bad: set[str] = field(default_factory=set)

    @property
    def names(self) -> set[str]:
        """All files."""
        return {*self.num_frames, *self.bad}


def make_corpus(folder: Path, num_videos: int, seed: int) -> Corpus:
    """Write the files of a corpus: half a second to two seconds of 160 x 120, and bad ones of five kinds."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    corpus = Corpus(folder)
    for i in range(num_videos):
        name = f"video-{i:04}.mp4"
        corpus.num_frames[name] = write_video(folder / name, rng)
        if i % _BAD_EVERY == _BAD_EVERY // 2:
            del corpus.num_frames[name]
            corpus.bad.add(name)
            content = (folder / name).read_bytes()
            kinds = (b"", b"no video" * 100, rng.bytes(2000), content[: len(content) // 2], content[:64])
            (folder / name).write_bytes(kinds[i // _BAD_EVERY % len(kinds)])
    return corpus


def write_video(path: Path, rng: np.random.Generator) -> int:
    """One video of a random colour and length; returns its number of frames."""
    color = rng.integers(0, 255, 3, dtype=np.uint8)
    num_frames = int(rng.integers(6, 25))
    frames = np.full((num_frames, 120, 160, 3), 96, dtype=np.uint8)
    for i in range(num_frames):
        frames[i, 30:90, 4 * i : 4 * i + 60] = color
    write_h264(path, frames, fps=12)
    return num_frames


def make_model(folder: Path) -> None:
    """A LongVLM with random weights and its tower."""
    build_untrained_tower(folder / "tower")
    build_untrained(folder, tower="tower", tower_dim=DIM)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A Ray cluster on this machine that outlives its drivers: a head, and nodes that are added and lost.

    Args:
        num_cpus: of the head; with none nothing is started, and drivers do without Ray.
        settings: more options of `ray start`, for the head.
    """

    def __init__(self, num_cpus: int = 2, *settings: str) -> None:
        # not where TMPDIR says: the names of sockets in it must be short
        self.folder = tempfile.TemporaryDirectory(prefix="lvf-", dir="/tmp", ignore_cleanup_errors=True)
        self.address = f"127.0.0.1:{free_port()}"
        self.env = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.processes: list[psutil.Process] = []
        if not num_cpus:
            self.env = {"RAY_ADDRESS": IN_PROCESS}
            return
        ports = (f"--port={self.address.rpartition(':')[2]}", f"--ray-client-server-port={free_port()}")
        self.processes.append(self._start("--head", *ports, *settings, num_cpus))

    def _start(self, *options: Any) -> psutil.Process:
        """Start a node; once more where it hangs, as one in some hundred does on a machine that is busy."""
        try:
            return self._start_once(*options)
        except HungError:
            return self._start_once(*options)

    def _start_once(self, *options: Any) -> psutil.Process:
        *settings, num_cpus = options
        fixed = ["--block", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
        fixed += [f"--num-cpus={num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        fixed.append("--include-log-monitor=false")
        if "--head" in settings:
            fixed += [
                f"--temp-dir={self.folder.name}",
                "--no-monitor",
            ]  # nobody asks for nodes, nor for what workers say
            if "--include-dashboard=true" not in settings:
                fixed.append("--include-dashboard=false")
        log = Path(self.folder.name, f"start-{secrets.token_hex(4)}.log")
        ray = Path(sys.executable).with_name("ray")
        with log.open("w") as out:
            process = subprocess.Popen(  # noqa: S603 - Ray's own command
                [ray, "start", *settings, *fixed],
                stdout=out,
                stderr=out,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        try:
            _await(lambda: "Ray runtime started" in log.read_text(), HEAD_START_S, "ray start")
        except HungError:
            kill_tree(psutil.Process(process.pid))
            raise
        return psutil.Process(process.pid)

    def add_node(self, num_cpus: int = 2) -> psutil.Process:
        """A second node on the same machine; kill it with `kill_tree`."""
        self.processes.append(self._start(f"--address={self.address}", num_cpus))
        return self.processes[-1]

    def workers(self, *marks: str) -> list[psutil.Process]:
        """The processes of this cluster whose command line holds one of the marks."""
        return [
            process
            for node in self.processes
            for process in descendants(node)
            if any(mark in command_of(process) for mark in marks)
        ]

    def await_idle(self, deadline_s: float = 30.0) -> None:
        """Until no job's worker and no decoder's child is left; HungError if that takes too long."""
        _await(lambda: not self.workers(*STAGE_MARKS, CHILD_MARK), deadline_s, "workers of a driver that is gone")

    def stop(self) -> None:
        """End every process of the cluster."""
        for node in self.processes:
            kill_tree(node)
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """The processes below one, none if it is gone."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> str:
    """A process's command line, empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_tree(process: psutil.Process) -> None:
    """End a process and all below it."""
    for one in [process, *descendants(process)]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    with suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
        process.wait(10)


def _await(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > deadline:
            raise HungError(f"{what}: not done after {deadline_s:.0f} s")
        time.sleep(_POLL_S)


@dataclass
class Ended:
    """The result of a driver that has ended."""

    code: int  # exit code, negative for the signal that killed it
    lines: list[dict[str, Any]]  # of JSON, on stdout
    said: str  # on stderr

    @property
    def counts(self) -> dict[str, Any] | None:
        """The last line, of a job that got to its end."""
        return self.lines[-1] if self.lines else None


class Driver:
    """A `longvlm` command in a process of its own, with faults from inside; see `driver`."""

    def __init__(self, folder: Path, arguments: list[str], env: dict[str, str], faults: dict[str, Any]) -> None:
        name = secrets.token_hex(4)
        self.command = arguments[0]
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            popen = subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-m", "benchmarks.faults.driver", json.dumps(faults), *arguments],
                stdout=out,
                stderr=err,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self._popen = popen
        self.process = psutil.Process(popen.pid)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._popen.poll() is None

    def signal(self, number: int) -> bool:
        """Send it a signal; False if it had ended."""
        if not self.is_running():
            return False
        self._popen.send_signal(number)
        return True

    def kill(self) -> None:
        """End it and all below it, if it is still there."""
        if self.is_running():
            kill_tree(self.process)
            self._popen.wait()

    def end(self, deadline_s: float = DEADLINE_S) -> Ended:
        """Wait for it; HungError if it takes too long."""
        try:
            code = self._popen.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            self.kill()
            said = self.err.read_text()[-300:]
            raise HungError(f"{self.command} not done after {deadline_s:.0f} s: {said}") from error
        lines = [json.loads(line) for line in self.out.read_text().splitlines() if line.startswith("{")]
        return Ended(code, lines, self.err.read_text())


@dataclass
class RealWorld:
    """The test bed that all faults share."""

    folder: Path
    corpus: Corpus
    model: Path
    head: Head
    rng: random.Random
    work_s: float = 0.0  # of an undisturbed run: from the recipe's commit to the first commit of videos,
    commits_s: float = 0.0  # and from there to the last
    tokens: dict[str, str] = field(default_factory=dict)  # that it made, by name, as digests


def make_world(folder: Path, num_videos: int, rng: random.Random, num_cpus: int = 2) -> RealWorld:
    """Write the corpus and the model, and start a cluster with so many CPUs, or none."""
    corpus = make_corpus(folder / "corpus", num_videos, rng.randrange(1 << 32))
    make_model(folder / "model")
    return RealWorld(folder, corpus, folder / "model", Head(num_cpus), rng)
