"""A watch over the cluster that a driver belongs to: what is lost of it is told before Ray ends the driver for it.

Ray's core ends the process of a driver some ten seconds after its raylet went and a minute after the GCS did, with all
that was finished and not committed yet, and from C++: nothing can be caught.
"""

import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

_POLL_S = 1.0
_GCS_PATIENCE_S = 30.0  # where it outlives its own end (KubeRay's fault tolerance) it is back by then; Ray waits 60 s
_RAYLET_PATIENCE_S = 2.0  # a raylet never comes back
_KNOCK_S = 10.0  # a machine that is busy is slow to answer

T = TypeVar("T")


class ClusterLostError(Exception):
    """The cluster went while a driver waited for it, in a sentence."""


class ClusterWatch:
    """Knocks at the GCS and at the driver's own raylet. Make one with `watch_cluster`."""

    def __init__(self, doors: dict[str, tuple[tuple[str, int], float]]) -> None:
        self._doors = doors  # by name: the address, and for how many seconds it may be closed
        self._last_open_s = dict.fromkeys(doors, time.monotonic())
        self._waiting: int | None = None  # the main thread, while it waits for the cluster
        self.lost: str | None = None  # what is lost, in a sentence
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

    def keep_looking(self) -> None:
        """Knock until this has ended; where something is lost, wake the main thread if it waits for the cluster."""
        while not self.ended.wait(_POLL_S):
            self.lost = self.lost or self.look()
            if self.lost and self._waiting is not None:
                signal.pthread_kill(self._waiting, signal.SIGTERM)  # which `connect` made a KeyboardInterrupt
                return

    def wait_for(self, results: Iterable[T]) -> Iterator[T]:
        """The results of the cluster as they come. Raises ClusterLostError where it is lost meanwhile."""
        left = iter(results)
        is_main = threading.current_thread() is threading.main_thread()
        while True:
            if self.lost:
                raise ClusterLostError(self.lost)
            try:
                self._waiting = threading.main_thread().ident if is_main else None
                result = next(left)
            except StopIteration:
                return
            except KeyboardInterrupt:
                if self.lost:
                    raise ClusterLostError(self.lost) from None
                raise
            finally:
                self._waiting = None
            yield result


@contextmanager
def watch_cluster() -> Iterator[ClusterWatch]:
    """Watch the cluster of this process's session while the body runs."""
    watch = ClusterWatch(_doors())
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
