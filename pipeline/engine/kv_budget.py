"""How much memory keys and values may take, measured where they will lie."""

from pathlib import Path

import psutil
import torch

# What is left over goes to activations, the allocator's gaps and, on a CPU, everybody else.
SHARE = {"cpu": 0.5, "cuda": 0.75}
_CGROUP = Path("/sys/fs/cgroup")


def kv_budget(device: torch.device, asked_bytes: int | None = None) -> int:
    """Bytes for keys and values on a device: what was asked for, at most a fixed share of what is free now."""
    free_bytes = _free_on_gpu(device) if device.type == "cuda" else _free_on_host()
    most = int(SHARE[device.type] * free_bytes)
    return most if asked_bytes is None else min(asked_bytes, most)


def _free_on_gpu(device: torch.device) -> int:
    """What the driver has left, and what torch holds of it without using it."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_on_host() -> int:
    """What the machine has available, or the container if it has less."""
    free_bytes = psutil.virtual_memory().available
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        free_bytes = min(free_bytes, int(most) - int(used.read_text()))
    return max(free_bytes, 0)
