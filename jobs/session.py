"""A Ray session for one job: a local one by default, somebody's cluster when asked."""

import logging
import os

import ray

from jobs.resources import TARGET_BLOCK_BYTES
from schemas.errors import InputError


def connect(ray_address: str | None) -> None:
    """Join the cluster at `ray_address` (or RAY_ADDRESS), or start a local Ray that ends with this process.

    A session that is already open is used as it is.

    Raises:
        InputError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a batch job has nothing to report home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone in CPU actors
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if not ray.is_initialized():
        local = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"no Ray cluster answers at {address} ({error}); check --ray-address.") from error
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.enable_progress_bars = False  # the jobs show their own, in videos and answers
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def failure_of(error: ray.exceptions.RayError) -> str:
    """What stopped a job, in one line: the worker's own exception where there is one."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    while cause.__cause__ is not None:  # Ray Data wraps what an operator raised
        cause = cause.__cause__
    return f"{type(cause).__name__}: {cause}".splitlines()[0]
