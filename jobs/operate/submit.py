"""Job submission to a Ray cluster: a command is submitted, its log followed, and its exit code given back."""

import asyncio
import logging
import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ray
import requests
from ray.job_submission import JobSubmissionClient

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.session import no_admittance
from longvlm.schemas.errors import InputError

_TRIES = 60  # to ask after a job, before the cluster counts as out of reach
_RETRY_S = 5.0
_RAYS_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\t(INFO|WARNING) \S+\.py:\d+ -- |Running entrypoint for job \S+: ")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class JobSubmission:
    """A job to submit: a command, and the cluster it runs on."""

    command: tuple[str, ...]  # as it would follow `longvlm`
    address: str  # http(s)://HEAD:8265
    working_dir: str | None = None  # sent along; paths in the command count from there
    pip: tuple[str, ...] = ()  # requirements that the cluster's image lacks
    env: dict[str, str] = field(default_factory=dict, repr=False)  # may hold secrets

    @property
    def entrypoint(self) -> str:
        """The shell command line of the job; every word of the command stays one word.

        Python is isolated (-I): what is installed there runs, whatever else lies in the folder that is sent along.
        """
        return shlex.join(["python", "-I", "-m", "longvlm", *self.command])

    def runtime_env(self) -> dict[str, Any]:
        """Ray's runtime environment of the job."""
        # Ray puts the folder on its workers' path, before Python's own library; isolated ones leave it out.
        isolated = "python -I" if self.working_dir else None
        wanted = {
            "working_dir": self.working_dir,
            "pip": list(self.pip),
            "env_vars": self.env,
            "py_executable": isolated,
        }
        return {name: value for name, value in wanted.items() if value}


def read_env(settings: tuple[str, ...]) -> dict[str, str]:
    """Read environment settings, NAME=VALUE, or NAME for its value here. InputErrors never repeat a value."""
    env = {}
    for setting in settings:
        name, is_given, value = setting.partition("=")
        if not _NAME.match(name):
            raise InputError("--env takes NAME=VALUE, or NAME alone for the value that it has here.")
        if not is_given and name not in os.environ:
            raise InputError(f"--env {name} has no value here; set it, or pass {name}=VALUE.")
        env[name] = value if is_given else os.environ[name]
    return env


class _OwnLines:
    """The lines of a job's log that are its own; what Ray tells of its work is left out, but for errors."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._begun = write, ""  # a line that has no end yet

    def write(self, text: str) -> None:
        """Take some of the log as it comes."""
        *lines, self._begun = (self._begun + text).split("\n")
        if own := [line for line in lines if not _RAYS_LINE.match(line)]:
            self._write("\n".join(own) + "\n")

    def close(self) -> None:
        """The log has ended."""
        if self._begun and not _RAYS_LINE.match(self._begun):
            self._write(self._begun)


class SubmittedJob:
    """A submitted job. Make one with `submit_job`."""

    def __init__(self, client: Any, job_id: str, address: str) -> None:
        self.client = client
        self.job_id = job_id
        self.address = address
        self._num_written = 0  # characters of the log

    @property
    def follow_hint(self) -> str:
        """The commands that follow and stop the job."""
        where = f"{self.job_id} --address {self.address}"
        return f"`ray job logs --follow {where}` follows it, `ray job stop {where}` ends it"

    def follow(self, write: Callable[[str], object]) -> tuple[int | None, str]:
        """Write the job's log until it ends; a connection that is lost meanwhile is made again.

        Returns:
            The job's exit code, None where it ended without one, and what the cluster says of that.

        Raises:
            ConnectionError: the cluster was out of reach for minutes. The job may go on.
        """
        own = _OwnLines(write)
        while True:
            with suppress(aiohttp.ClientError, RuntimeError, OSError):  # cut off; what is asked next says why
                asyncio.run(self._tail(own.write))
            info = self._info()
            if info.status.is_terminal():
                own.close()
                return info.driver_exit_code, f"{info.status.value}: {info.message or 'nothing is said of why'}"
            time.sleep(_RETRY_S)

    async def _tail(self, write: Callable[[str], object]) -> None:
        """Write the log as it grows, without the characters that were written before."""
        position = 0
        async for text in self.client.tail_job_logs(self.job_id):  # from the beginning, each time
            position += len(text)
            if position > self._num_written:
                write(text[len(text) - (position - self._num_written) :])
                self._num_written = position

    def _info(self) -> Any:
        for attempt in range(_TRIES):
            try:
                return self.client.get_job_info(self.job_id)
            except (requests.RequestException, RuntimeError) as error:
                if attempt + 1 == _TRIES:
                    raise ConnectionError(f"{self.address} is out of reach ({error})") from error
                time.sleep(_RETRY_S)
        return None


def submit_job(order: JobSubmission) -> SubmittedJob:
    """Submit a job.

    Raises:
        InputError: there is no cluster at the address, it refuses who asks, or what is sent along cannot be sent.
    """
    if not order.address.startswith(("http://", "https://")):
        raise InputError(f"--address {order.address} is not a Ray dashboard; it looks like http://HEAD:8265.")
    if order.working_dir and not (Path(order.working_dir).is_dir() or "://" in order.working_dir):
        raise InputError(f"--working-dir {order.working_dir} is no folder; name one, or leave it out.")
    doing(f"sending the job to {order.address}")
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # the client tells what it packs and uploads
    try:
        os.environ["RAY_API_SERVER_ADDRESS"] = order.address  # Ray prefers RAY_ADDRESS to the address that it is given
        client = JobSubmissionClient(order.address)
        job_id = client.submit_job(entrypoint=order.entrypoint, runtime_env=order.runtime_env())
    except ray.exceptions.AuthenticationError as error:
        raise no_admittance(order.address, str(error)) from error
    except (ConnectionError, requests.RequestException) as error:
        raise InputError(f"no Ray dashboard answers at {order.address}; check --address and the network.") from error
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"the cluster at {order.address} did not take the job: {reason}") from error
    return SubmittedJob(client, job_id, order.address)
