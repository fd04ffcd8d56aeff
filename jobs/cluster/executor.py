"""Where the stages of a job run: on Ray, or one after another in this process.

A job describes its stages as data and hands them to an executor; what goes in and comes out are Arrow tables. Ray
brings parallel workers, which may die. Without it a stage can be replayed in a notebook, and some videos need no more.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from longvlm.jobs.cluster.tally import Tally

IN_PROCESS = "none"  # in place of a cluster's address: no Ray at all


@dataclass(frozen=True)
class Stage:
    """One stage of a job: an operator over tables, and its share of the cluster."""

    operator: Callable[..., Any]  # a class; its objects take a table and give a table, or several one by one
    args: tuple[Any, ...]  # of its constructor
    batch_size: int | None  # rows a call; None: a block as it comes
    workers: int  # that it begins with, and the least
    cpus: float  # of each worker
    gpus: float = 0.0
    threads: int = 1  # of each worker that call the operator at the same time
    most: int | None = None  # workers that it may grow to where the cluster does; None: those that it begins with


class OutOfTimeError(Exception):
    """The time that a run was given is over: it ends well, with some videos not attempted."""


class StageError(Exception):
    """What stopped a job's stages, in one line: a worker's own exception, or the loss of the cluster."""


class Executor(Protocol):
    """Runs the stages of jobs."""

    def resources(self) -> Mapping[str, float]:
        """What there is, as `ray.cluster_resources()` counts it: CPU, GPU."""

    def start_tally(self, run_id: str) -> Any:
        """A tally for one run, with the methods of `Tally`, that stages may take along to their workers."""

    def run(
        self, blocks: Sequence[pa.Table], stages: Sequence[Stage], ends_s: float | None = None
    ) -> Iterator[pa.Table]:
        """The stages over the blocks: what the last one gives, as it lands and in any order.

        Args:
            blocks: what goes into the first stage.
            stages: to be run.
            ends_s: when nothing is waited for any more, in seconds since the epoch.

        Raises:
            StageError: a stage broke off, or nothing moves in any.
            OutOfTimeError: the time is over.
        """

    def release(self) -> None:
        """Give back the workers of a run that broke off."""


class InProcess:
    """This process as executor: nothing runs in parallel, and what kills a stage kills the job."""

    def resources(self) -> Mapping[str, float]:
        """The cores that OpenMP may use, and the GPUs."""
        import torch

        cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        return {"CPU": float(cores), "GPU": float(torch.cuda.device_count())}

    def start_tally(self, run_id: str) -> Tally:
        """A tally in this process."""
        return Tally(run_id)

    def run(
        self,
        blocks: Sequence[pa.Table],
        stages: Sequence[Stage],
        ends_s: float | None = None,  # noqa: ARG002 - who takes the results looks at the clock
    ) -> Iterator[pa.Table]:
        """`run_inprocess`, with what a stage raises as StageError, as Ray would have it; no wait is cut short."""
        try:
            yield from run_inprocess(blocks, stages)
        except Exception as error:
            raise StageError(f"{type(error).__name__}: {error}") from error

    def release(self) -> None:
        """There is nothing to give back."""


def run_inprocess(blocks: Iterable[pa.Table], stages: Sequence[Stage]) -> Iterator[pa.Table]:
    """The stages over some tables in this process: a table is taken through all of them before the next one is read.

    Every operator is made once. Those that have a method `close` are closed at the end, however it comes.

    Args:
        blocks: what the first stage takes.
        stages: their share of a cluster does not matter here.

    Raises what a stage raises.
    """
    with ExitStack() as stack:
        tables = iter(blocks)
        for stage in stages:
            operator = stage.operator(*stage.args)
            if close := getattr(operator, "close", None):
                stack.callback(close)
            tables = _outputs(operator, _batches(tables, stage.batch_size))
        yield from tables


def _outputs(operator: Callable[[pa.Table], Any], batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for batch in batches:
        found = operator(batch)
        if isinstance(found, pa.Table):
            yield found
        else:
            yield from found


def _batches(tables: Iterator[pa.Table], num_rows: int | None) -> Iterator[pa.Table]:
    """The same rows in tables of `num_rows`, the last one shorter; or as they come."""
    if num_rows is None:
        yield from tables
        return
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= num_rows:
            together = pa.concat_tables(waiting)
            yield together.slice(0, num_rows)
            waiting = [together.slice(num_rows)]
    if rest := [table for table in waiting if len(table)]:
        yield pa.concat_tables(rest)
