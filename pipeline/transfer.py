"""Copies between the host and a device that nobody waits for until the numbers are needed.

A copy to or from ordinary memory makes the host wait for all that the device was given before it. One of pinned memory
is queued like any other work, so that the host can prepare what comes next. On a CPU there is nothing to copy.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, in its own type: what travels is not made wider on the way."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of Python as a tensor on a device."""
    return to_device(torch.tensor(values, dtype=dtype), device)


class Fetch:
    """Tensors of one device on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        """Queue the copies, behind all that makes these tensors."""
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._tensors = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, in the order given, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
