"""A watch over the cluster that a driver belongs to: what is lost of it is told before Ray ends the driver for it.

It also ends a wait that would have no end: when the time of the run is over, or nothing moves in any stage.

Ray's core ends the process of a driver some ten seconds after its raylet went and a minute after the GCS did, with all
that was finished and not committed yet, and from C++: nothing can be caught.
"""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from longvlm.jobs.cluster.executor import OutOfTimeError

_POLL_S = 1.0
_GCS_PATIENCE_S = 30.0  # where it outlives its own end (KubeRay's fault tolerance) it is back by then; Ray waits 60 s
_RAYLET_PATIENCE_S = 2.0  # a raylet never comes back
_KNOCK_S = 10.0  # a machine that is busy is slow to answer
_STALL_S = 1800.0  # in which nothing is begun or finished in any stage: no unit takes as long, nor does loading a model
_STALL_POLL_S = 30.0
_ASLEEP_S = 60.0  # between two looks: this process was stopped, or its machine was

T = TypeVar("T")


class ClusterLostError(Exception):
    """The cluster went while a driver waited for it, in a sentence."""


class ClusterWatch:
    """Knocks at the GCS and at the driver's own raylet. Make one with `watch_cluster`.

    Args:
        doors: by name: an address, and for how many seconds it may be closed.
        ends_s: when the wait is over, in seconds since the epoch.
        stall: for how many seconds nothing has moved, and where, in words; None where that is not known. What was
            before this watch does not count: nothing could move while another run had the turn.
    """

    def __init__(
        self,
        doors: dict[str, tuple[tuple[str, int], float]],
        ends_s: float | None = None,
        stall: Callable[[], tuple[float, str] | None] = lambda: None,
    ) -> None:
        self._doors, self._ends_s, self._stall = doors, ends_s, stall
        self._next_stall_s = time.monotonic() + _STALL_POLL_S
        self._last_open_s = dict.fromkeys(doors, time.monotonic())
        self._looked_s = self._awake_since_s = time.monotonic()
        self._waiting: int | None = None  # the main thread, while it waits for the cluster
        self.lost: str | None = None  # what is lost, in a sentence
        self.is_over = False  # the time
        self.ended = threading.Event()

    def look(self) -> str | None:
        """Knock once; what is lost for longer than it may be, in a sentence."""
        for name, (address, patience_s) in self._doors.items():
            try:
                socket.create_connection(address, timeout=_KNOCK_S).close()
            except TimeoutError:
                continue  # busy, or cut off: Ray has its own patience with networks
            except OSError as error:
                if time.monotonic() - self._last_open_s[name] > patience_s:
                    where = f"{address[0]}:{address[1]}"
                    return f"the Ray cluster was lost: its {name} at {where} is gone ({error.strerror}), killed perhaps"
                continue
            self._last_open_s[name] = time.monotonic()
        return None

    def look_at_stages(self) -> str | None:
        """That nothing moves for longer than anything may take, in a sentence.

        While this process slept nothing could: what is at work waits for it to take what is done.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s > _ASLEEP_S:
            self._awake_since_s = now_s
        self._looked_s = now_s
        if now_s < self._next_stall_s:
            return None
        self._next_stall_s = now_s + _STALL_POLL_S
        stall = self._stall()
        if stall is None or min(stall[0], now_s - self._awake_since_s) <= _STALL_S:
            return None
        return f"nothing has moved for {stall[0] / 60:.0f} minutes; at work: {stall[1]}; see the logs of these workers"

    def keep_looking(self) -> None:
        """Look until this has ended; where a wait is to end, wake the main thread if it waits for the cluster."""
        while not self.ended.wait(_POLL_S):
            self.lost = self.lost or self.look() or self.look_at_stages()
            self.is_over = self._ends_s is not None and time.time() > self._ends_s
            if (self.lost or self.is_over) and self._waiting is not None:
                signal.pthread_kill(self._waiting, signal.SIGTERM)  # which `connect` made a KeyboardInterrupt
                return

    def wait_for(self, results: Iterable[T]) -> Iterator[T]:
        """The results of the cluster as they come.

        Raises:
            ClusterLostError: it is lost meanwhile, or nothing moves in it.
            OutOfTimeError: the time is over.
        """
        left = iter(results)
        is_main = threading.current_thread() is threading.main_thread()
        while True:
            self._check()
            try:
                self._waiting = threading.main_thread().ident if is_main else None
                result = next(left)
            except StopIteration:
                return
            except KeyboardInterrupt:
                self._check()
                raise
            finally:
                self._waiting = None
            yield result

    def _check(self) -> None:
        if self.lost:
            raise ClusterLostError(self.lost) from None
        if self.is_over:
            raise OutOfTimeError from None


@contextmanager
def watch_cluster(
    ends_s: float | None = None, stall: Callable[[], tuple[float, str] | None] = lambda: None
) -> Iterator[ClusterWatch]:
    """Watch the cluster of this process's session while the body runs; arguments as of `ClusterWatch`."""
    watch = ClusterWatch(_doors(), ends_s, stall)
    looker = threading.Thread(target=watch.keep_looking, daemon=True)
    looker.start()
    try:
        yield watch
    finally:
        watch.ended.set()


def _doors() -> dict[str, tuple[tuple[str, int], float]]:
    """Where to knock; nowhere in a session of ray://, whose client says by itself that it is cut off."""
    if ray.util.client.ray.is_connected():
        return {}
    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    doors = {"GCS": ((host.strip("[]"), int(port)), _GCS_PATIENCE_S)}
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            doors["raylet"] = ((node["NodeManagerAddress"], int(node["NodeManagerPort"])), _RAYLET_PATIENCE_S)
    return doors
