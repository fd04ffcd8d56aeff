"""A Ray session for one job: a local one by default, somebody's cluster when asked."""

import gc
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager

import ray

from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.cluster.resources import TARGET_BLOCK_BYTES
from longvlm.schemas.errors import InputError

# Ray puts the folder that it is started in first on its workers' path: somebody's torch.py there would be taken for
# PyTorch. So it is started where daemons are; what workers are told of are whole paths.
_NEUTRAL = "/"


def connect(ray_address: str | None) -> None:
    """Join the cluster at `ray_address` (or RAY_ADDRESS), or start a local Ray that ends with this process.

    A session that is already open is used as it is.

    Raises:
        InputError: no cluster answers at the address, or there is to be none.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if address == IN_PROCESS:
        raise InputError(
            f"this job needs Ray; leave out --ray-address {IN_PROCESS} (or RAY_ADDRESS) to start a local one."
        )
    if not ray.is_initialized():
        try:
            if address == "local":
                _start_local()
            else:
                _knock(address)
                with chdir(_NEUTRAL):
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError) as error:
            raise InputError(f"no Ray cluster answers at {address} ({error}); check --ray-address.") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Kubernetes' way of pressing Ctrl-C; Ray would abort
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.enable_progress_bars = False  # the jobs show their own, in videos and answers
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # nobody reads it, and reading a worker's page tables is not free
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _start_local() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a batch job has nothing to report home
    # Ray Data keeps its actors' arguments alive; Ray's core warns on stderr, once a run, that somebody should.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _silent_stderr(), chdir(_NEUTRAL):  # Ray's core tells on stderr that its log level was set
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send what C++ code writes to stderr nowhere; Python exceptions still come out."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def failure_of(error: ray.exceptions.RayError) -> str:
    """What stopped a job, in one line: the worker's own exception where there is one."""
    raised = re.search(r"^\w+(?:Error|Exception)\b.*", str(error), re.MULTILINE)  # the first of the chain in the text
    return raised[0] if raised else str(error).partition("\n")[0]


def release_failed_execution() -> None:
    """Give back the workers of an execution of Ray Data that broke off: they live as long as anything refers to it.

    The exception's traceback does, in a cycle that only the collector undoes, and until then the workers hold the CPUs
    that the next run in this process waits for.
    """
    gc.collect()
