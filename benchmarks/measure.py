"""Timing side by side: what is compared runs in turn, so that a noisy machine disturbs both alike."""

import time
from collections.abc import Callable, Mapping


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
