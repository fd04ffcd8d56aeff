"""A decoding step that a GPU goes through again by itself: recorded once (a CUDA graph), then replayed.

Starting the thousand kernels of a 7B model's step takes a host some 20 ms, several times what a GPU needs to run them.
A replay starts them all at once, on the same memory: whatever a step reads and writes has to stay where it is.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


class GraphMemory:
    """The device memory of recordings that come one after another, and the stream that they are made in.

    An empty recording keeps it: with the last one gone, torch would neither reuse nor return it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._device = device
        self._keeper = self.record(lambda: None)

    def record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record what a step starts; nothing of it runs.

        Raises:
            torch.OutOfMemoryError: there is no room for what the step makes.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # of this thread alone: others may allocate meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                torch.zeros(1, device=self._device)  # no recording is empty, which torch would warn of
                step()
            except BaseException:  # most likely there was no room
                with suppress(RuntimeError):  # it says that the recording is of no use
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph


class RecordedStep:
    """A step over tensors that stay where they are: run as it is the first time, recorded and replayed from then on.

    The first run loads what recording could not. Without memory for graphs each is run as it is.
    """

    def __init__(self, step: Callable[[], None], memory: GraphMemory | None) -> None:
        self._step, self._memory = step, memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False

    def __call__(self) -> None:
        """One step."""
        if self._memory is not None and self._has_run:
            if self._graph is None:
                self._graph = self._memory.record(self._step)
            self._graph.replay()
        else:
            self._step()
            self._has_run = True
