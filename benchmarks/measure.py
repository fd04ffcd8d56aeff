"""Timing functions side by side, so that a noisy machine disturbs all alike, and peak rates of a device."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def interleave(
    functions: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function, once a round, after one untimed round that warms caches and allocators."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if round_number:
                seconds[name].append(clock() - start)
    return seconds


def finished(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A function that returns when the device has done all it was given."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of ten calls."""
    return min(interleave({"it": finished(function, device)}, 10)["it"])


def square_product(device: torch.device, side: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """What stands for a device's peak, at 2 side^3 operations."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right.T, out=product)


def peak_flops(device: torch.device, side: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of a square product, a second."""
    return 2 * side**3 / fastest(square_product(device, side, dtype), device)


def bandwidth(device: torch.device, num_rows: int = 16_384, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes a second of a matrix-vector product; by default of a matrix that fits no cache (1 GB and more)."""
    matrix = torch.randn(num_rows, 32_768, device=device, dtype=dtype)
    vector = torch.randn(1, 32_768, device=device, dtype=dtype)
    return matrix.nbytes / fastest(lambda: nn.functional.linear(vector, matrix), device)
