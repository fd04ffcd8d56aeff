"""Ray as the executor of stages: Ray Data with an actor pool a stage, and a tally in an actor of its own.

Pools grow where nodes join. Runs on one cluster start one after another: each has the turn until its first result,
which shows that it has a worker of every stage, so that no two can each hold what the other waits for.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from longvlm.jobs.cluster import logs
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.executor import Stage, StageError
from longvlm.jobs.cluster.session import connect, failure_of, release_failed_execution
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.cluster.watch import ClusterLostError, watch_cluster

_REPORT_S = 10.0  # for the tally to answer where nothing depends on it
_TURN_S = 1  # between two looks whether it is this run's turn
_OF_HEAD = {"node:__internal_head__": 0.6}  # of what a cluster has 1.0 of, on its head; Ray pins things there by 0.001


class RayExecutor:
    """A Ray cluster as executor; the session is opened when this is made.

    Raises:
        InputError: no cluster answers at the address.
    """

    def __init__(self, ray_address: str | None) -> None:
        connect(ray_address)
        self._tally: RemoteTally | None = None

    def resources(self) -> Mapping[str, float]:
        """What the cluster has."""
        found: Mapping[str, float] = ray.cluster_resources()
        return found

    def start_tally(self, run_id: str) -> "RemoteTally":
        """A tally in an actor named `tally-RUN_ID`. It needs no CPU; if its node dies it comes back, counting anew."""
        options = {"name": f"tally-{run_id}", "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._tally = RemoteTally(ray.remote(Tally).options(**options).remote(run_id))
        return self._tally

    def run(
        self, blocks: Sequence[pa.Table], stages: Sequence[Stage], ends_s: float | None = None
    ) -> Iterator[pa.Table]:
        """The stages as actor pools of Ray Data, when it is this run's turn to start them."""
        turn = StartTurn()
        try:
            self._wait_for(turn, ends_s)
            data = ray.data.from_blocks(list(blocks))  # not from_arrow, which runs a task a block to look at it
            for stage in stages:
                data = data.map_batches(
                    stage.operator,
                    fn_constructor_args=stage.args,
                    batch_size=stage.batch_size,
                    batch_format="pyarrow",
                    compute=ActorPoolStrategy(
                        min_size=stage.workers,
                        max_size=max(stage.workers, stage.most or 0),
                        max_concurrent_calls_per_actor=stage.threads,
                        enable_true_multi_threading=stage.threads > 1,
                    ),
                    num_cpus=stage.cpus,
                    num_gpus=stage.gpus,
                )
            with watch_cluster(ends_s, self._tally.stall if self._tally else lambda: None) as watch:
                results = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
                for result in watch.wait_for(results):
                    turn.give_back()
                    yield result
        except ClusterLostError as error:
            ray.shutdown()  # else Ray ends this process before what is finished is committed
            raise StageError(str(error)) from error
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise StageError(failure_of(error)) from error
        finally:
            turn.give_back()

    def _wait_for(self, turn: "StartTurn", ends_s: float | None) -> None:
        """Wait until this run has the turn to start its stages."""
        with watch_cluster(ends_s) as watch:
            looks = watch.wait_for(turn.looks())
            if next(looks):
                return
            logs.log.warning("another run starts on this cluster: waiting for its first result")
            if self._tally is None or self._tally.begun_s() is None:  # else there are bars on the screen
                doing("waiting for another run to start on this cluster")
            while not next(looks):
                pass

    def release(self) -> None:
        """Give back the workers of a run that broke off; to be called when no exception is held any more."""
        release_failed_execution()


class StartTurn:
    """The turn to start stages on a cluster, which one run has at a time.

    It is a placement group that takes more than half of a resource of which there is one, so no process holds it; Ray
    gives it to those who ask one after another, and takes it back from a driver that ends.
    """

    def __init__(self) -> None:
        self._group: PlacementGroup | None = None

    def looks(self) -> Iterator[bool]:
        """Asks for the turn, and looks whether it is had by now, for a second each time."""
        self._group = placement_group([_OF_HEAD])
        while True:
            yield self._group.wait(_TURN_S)

    def give_back(self) -> None:
        """Let the next run have it; also when it was only asked for, or given back before. Waits for no answer."""
        if self._group is not None and ray.is_initialized():
            Thread(target=_remove, args=(self._group,), daemon=True).start()
        self._group = None


def _remove(group: PlacementGroup) -> None:
    with suppress(ray.exceptions.RayError, ConnectionError):  # what is lost with the cluster needs no giving back
        remove_placement_group(group)  # waits for a GCS that is lost until Ray ends the process


class RemoteTally:
    """A tally in an actor, for the driver and for the workers of every stage."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def attempts(self, stage: str, keys: list[str]) -> list[int]:
        """As `Tally.attempts`."""
        return self._ask("attempts", stage, keys)

    def begin(self, stage: str, keys: list[str], worker: str) -> None:
        """As `Tally.begin`; returns when the actor knows, for the work may kill who asks."""
        self._ask("begin", stage, keys, worker)

    def finish(self, stage: str, keys: list[str], *, worker: str, busy_s: float, cpu_s: float) -> None:
        """As `Tally.finish`; nobody waits for it."""
        self._actor.finish.remote(stage, keys, worker=worker, busy_s=busy_s, cpu_s=cpu_s)

    def add_tokens(self, phase: str, number: int, *, worker: str, busy_s: float) -> None:
        """As `Tally.add_tokens`; nobody waits for it."""
        self._actor.add_tokens.remote(phase, number, worker=worker, busy_s=busy_s)

    def worker_run_id(self) -> str | None:
        """As `Tally.worker_run_id`: the stages of this tally run in workers."""
        return self._ask("run_id")

    def begun_s(self) -> float | None:
        """As `Tally.begun_s`; None where the cluster is lost."""
        return self._report("begun_s", None)

    def stall(self) -> tuple[float, str] | None:
        """As `Tally.stall`; None where the cluster is lost."""
        return self._report("stall", None)

    def report(self) -> dict[str, dict[str, float]]:
        """As `Tally.report`; empty where the cluster is lost, for a run still has to tell what it committed."""
        return self._report("report", {})

    def _report(self, method: str, otherwise: Any) -> Any:
        if not ray.is_initialized():
            return otherwise
        try:
            return ray.get(getattr(self._actor, method).remote(), timeout=_REPORT_S)
        except ray.exceptions.RayError as error:
            logs.log.warning("the tally of the run does not answer: %s", failure_of(error))
            return otherwise

    def _ask(self, method: str, *args: Any) -> Any:
        """What the actor's method returns. Raises StageError where the actor, or the cluster, is gone."""
        try:
            return ray.get(getattr(self._actor, method).remote(*args))
        except ray.exceptions.RayError as error:
            raise StageError(failure_of(error)) from error
