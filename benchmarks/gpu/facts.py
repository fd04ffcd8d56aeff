"""Facts of the device: what it is, what is installed, whether it could decode video, and that it computes at all."""

import ctypes
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.section import Run, check

PACKAGES = ("torch", "transformers", "numpy", "pandas", "pyarrow", "safetensors", "tokenizers", "peft", "pytest")


def run(run: Run) -> None:
    """Note all that is known, then multiply two matrices."""
    if run.device.type == "cuda" and not torch.cuda.is_available():
        run.note(device=None)
        return
    host = {"cpu_cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "os": platform.platform()}
    device = _cuda() if run.device.type == "cuda" else {"device": "cpu"}
    run.note(**device, **host, python=platform.python_version(), versions={name: _version(name) for name in PACKAGES})
    run.note(libcuda=_loads("libcuda.so.1"), libnvcuvid=_loads("libnvcuvid.so.1"))
    run.say(
        f"{device['device']}, torch {torch.__version__}, hardware decoding: {_loads('libnvcuvid.so.1') or 'can be'}"
    )
    numbers = torch.arange(64.0).view(8, 8)
    product = (numbers.to(run.device) @ numbers.to(run.device)).cpu()
    check(product.equal(numbers @ numbers), "a product of small whole numbers is not what the CPU makes of it.")
    run.note(computes=True)


def _cuda() -> dict[str, Any]:
    of = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "device": of.name,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "capability": f"{of.major}.{of.minor}",
        "processors": of.multi_processor_count,
        "memory_bytes": total_bytes,
        "free_bytes": free_bytes,
        "devices": torch.cuda.device_count(),
    }


def _driver() -> str | None:
    """Its version, as its own tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - as found
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _loads(library: str) -> str | None:
    """None if a library can be loaded, else why not."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None
