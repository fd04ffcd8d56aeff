"""A Ray session for one job: a local one by default, somebody's cluster when asked."""

import gc
import logging
import os
import platform
import re
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import ray
from ray._private import auto_init_hook

from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.cluster.resources import TARGET_BLOCK_BYTES
from longvlm.jobs.cluster.trouble import trouble
from longvlm.schemas.errors import InputError

# Ray puts the folder that it is started in first on its workers' path: somebody's torch.py there would be taken for
# PyTorch. So it is started where daemons are; what workers are told of are whole paths.
_NEUTRAL = "/"
_LONGEST_SOCKET = 107  # bytes of the path of a Unix socket
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"  # below Ray's folder


def connect(ray_address: str | None) -> None:
    """Join the cluster at `ray_address` (or RAY_ADDRESS), or start a local Ray that ends with this process.

    A session that is already open is used as it is.

    Raises:
        InputError: no cluster answers at the address, Ray cannot start on this machine, or there is to be none.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    is_of_ray = ray_address in (None, os.environ.get("RAY_ADDRESS"))
    named = "RAY_ADDRESS" if is_of_ray else "--ray-address"  # what a person would change
    if address == IN_PROCESS:
        raise InputError(f"this job needs Ray; leave out {named} {IN_PROCESS} to start a local one.")
    if not ray.is_initialized():
        if address == "local":
            _start_local()
        else:
            _join(address, named)
    auto_init_hook.enable_auto_connect = False  # whoever asks a cluster that went would start another, here
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Kubernetes' way of pressing Ctrl-C; Ray would abort
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.enable_progress_bars = False  # the jobs show their own, in videos and answers
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # nobody reads it, and reading a worker's page tables is not free
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _join(address: str, named: str) -> None:
    """Join somebody's cluster; `named` is where its address was found."""
    protocol = address.partition("://")[0] if "://" in address else "ray"
    if protocol in ("http", "https"):
        raise InputError(
            f"{named} {address} is a dashboard's address, and a job joins a cluster at HEAD:6379, ray://HEAD:10001 or "
            f"auto; for a dashboard there is `longvlm submit --address {address}`."
        )
    if protocol != "ray":
        raise InputError(f"{named} {address} is no address of Ray's; write HEAD:6379, ray://HEAD:10001 or auto.")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what Ray's core warns of is for who runs the cluster
    try:
        _knock(address)
        with _silent_stderr(), chdir(_NEUTRAL):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare ones, too
        said = str(error)
        if isinstance(error, ray.exceptions.AuthenticationError) or "authentication token" in said.lower():
            raise no_admittance(address, said) from error
        if "ersion mismatch" in said:
            there = " and ".join(re.findall(r"(?:Ray|Python): \S+", said.partition("This process")[0])) or "another Ray"
            raise InputError(
                f"the Ray cluster at {address} has {there}, and here are Ray: {ray.__version__} and Python: "
                f"{platform.python_version()}; install the same, or use `longvlm submit`."
            ) from error
        if address == "auto":
            raise InputError(
                f"{named} is auto, and {_first_sentence(said)}; start one with `ray start --head`, name one by its "
                f"address, or leave {named} out to start one for this run."
            ) from error
        raise InputError(
            f"no Ray cluster answers at {address} ({_first_sentence(said)}); check {named} and the network."
        ) from error


def no_admittance(address: str, said: str) -> InputError:
    """That a cluster wants a token and got none, or another one than its own; Ray's own words tell which."""
    is_missing = not _has_token() or re.search("missing|no authentication token", said, re.IGNORECASE)
    got = "got none" if is_missing else "refuses this one"
    mode = re.search(r"RAY_AUTH_MODE is currently '(\w+)'", said)
    is_off = f" (RAY_AUTH_MODE is {mode[1]} here, so none is sent)" if mode else ""
    return InputError(
        f"the Ray cluster at {address} wants a token and {got}{is_off}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to "
        "the cluster's own, or RAY_AUTH_TOKEN_PATH to a file with it."
    )


def _first_sentence(text: str) -> str:
    """The first sentence of what Ray says, which goes on with hints for users of its own command line."""
    said = " ".join(text.split()).partition(". ")[0].rstrip(".")
    return said or "it does not say why"


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _start_local() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a batch job has nothing to report home
    # Ray Data keeps its actors' arguments alive; Ray's core warns on stderr, once a run, that somebody should.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    folder = _folder_for_ray()
    _bring_token()
    try:
        with _silent_stderr(), chdir(_NEUTRAL):  # Ray's core tells on stderr that its log level was set
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
    except Exception as error:  # Ray raises bare ones, too
        ray.shutdown()  # what it has started by then
        said = trouble(error) or (
            f"{_first_sentence(str(error))}; is the machine very busy, or short of memory or processes? Try again, or "
            "set RAY_ADDRESS=none, which does without Ray."
        )
        raise InputError(f"Ray did not start on this machine: {said}") from error


def _folder_for_ray() -> str:
    """The folder for Ray's files: in the temporary one, or where that has too long a path for Ray's sockets, in /tmp.

    Raises:
        InputError: there is none.
    """
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    for parent in (wanted, "/tmp", "/var/tmp"):  # noqa: S108 - Ray's own default
        folder = Path(parent).absolute() / "ray"
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        is_short = len(os.fsencode(folder)) + len(_SOCKET) <= _LONGEST_SOCKET
        if is_short and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
            return str(folder)
    raise InputError(
        f"Ray's sockets need a folder that can be written and whose path has at most "
        f"{_LONGEST_SOCKET - len(_SOCKET) - len('/ray')} bytes, and {wanted} is none; set RAY_TMPDIR to one."
    )


def _bring_token() -> None:
    """Give a local Ray a token of its own where HOME has none: Ray would write one there, and may not be able to."""
    if not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _has_token() -> bool:
    """Whether Ray finds a token here."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or os.access(os.path.expanduser("~/.ray/auth_token"), os.R_OK)  # noqa: PTH111 - never raises


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


def failure_of(error: Exception) -> str:
    """What stopped a job, in one line: the worker's own exception where there is one."""
    raised = re.search(r"^\w+(?:Error|Exception)\b.*", str(error), re.MULTILINE)  # the first of the chain in the text
    return raised[0] if raised else str(error).partition("\n")[0]


def release_failed_execution() -> None:
    """Give back the workers of an execution of Ray Data that broke off: they live as long as anything refers to it.

    The exception's traceback does, in a cycle that only the collector undoes, and until then the workers hold the CPUs
    that the next run in this process waits for.
    """
    gc.collect()
