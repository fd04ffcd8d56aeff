"""Copies between the host and a device that nobody waits for until the numbers are needed.

A copy to or from ordinary memory makes the host wait for all that the device was given before it. One of pinned memory
is queued like any other work, so that the host can prepare what comes next. On a CPU there is nothing to copy.

What is queued in one stream runs one after another, copies too. That does for numbers; large copies go `beside`, in
streams of their own, where the copy engines work on them while the device computes. Each way has its stream, or frames
on their way there would queue behind results that are still to be computed.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, in its own type: what travels is not made wider on the way."""
    if device.type == "cpu" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of Python as a tensor on a device."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_device_beside(values: Tensor, device: torch.device) -> Tensor:
    """As `to_device`, but copied while the device still computes what it was given before."""
    if device.type != "cuda" or values.device.type != "cpu":
        return to_device(values, device)
    copies, computing = _stream_beside(device, "there"), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        there = to_device(values, device)
    computing.wait_stream(copies)  # the device does, not the host: all that is queued from here on finds the copy done
    there.record_stream(computing)  # made for the other stream, which must not reuse its memory before this one is done
    return there


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
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, in the order given, once they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def fetch_beside(*tensors: Tensor) -> Fetch:
    """Tensors of one device on their way to the host, while it computes what it is given next.

    That must not write into them: it may run before they are copied. `Fetch` itself copies in the order of the queue.
    """
    device = tensors[0].device
    if device.type != "cuda":
        return Fetch(*tensors)
    copies = _stream_beside(device, "back")
    copies.wait_stream(torch.cuda.current_stream(device))  # until all is computed that makes them
    with torch.cuda.stream(copies):
        fetch = Fetch(*tensors)
    for tensor in tensors:
        tensor.record_stream(copies)  # whoever lets go of it now: its memory is not reused before it is copied
    return fetch


@functools.cache
def _stream_beside(device: torch.device, way: Literal["there", "back"]) -> torch.cuda.Stream:  # noqa: ARG001 - a key
    """The device's stream for large copies of one way."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
