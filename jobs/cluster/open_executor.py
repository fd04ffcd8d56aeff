"""The executor at an address; Ray is loaded only where it is one of Ray."""

import os

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.executor import IN_PROCESS, Executor, InProcess


def open_executor(ray_address: str | None) -> Executor:
    """The executor at an address, or at RAY_ADDRESS: a Ray cluster, a local Ray where neither is set, or IN_PROCESS.

    Raises:
        InputError: no cluster answers at the address.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if address == IN_PROCESS:
        return InProcess()
    doing("starting Ray" if address == "local" else f"joining the Ray cluster at {address}")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # what tidies up after a lost cluster must not start another
    from longvlm.jobs.cluster.ray_executor import RayExecutor

    return RayExecutor(ray_address)
