"""A driver with injected faults: a `longvlm` command as it is, but committing every half second.

    python -m benchmarks.faults.driver '{"slow": 0.05}' index SOURCE --store S ...

The first argument names faults of `FAULTS` and what they are told. Stages are hurt through subclasses that are made in
functions, so that Ray sends them to its workers by value.
"""

import ctypes
import json
import operator
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

import longvlm.jobs.cluster.commits
import longvlm.jobs.cluster.watch
import longvlm.jobs.index.run
from longvlm.jobs.cluster.resources import DECODE_DEADLINE_S, for_index
from longvlm.jobs.index import stages
from longvlm.pipeline.decode import video
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.store.ledger import Store

COMMIT_EVERY_S = 0.5  # so that a run of seconds has commits to be killed after
UNITS_PER_SHARD = 8
CHILD_MEMORY_BYTES = 600 << 20
CHILD_DEADLINE_S = {"hang": 8.0}  # of the others a busy machine may take longer to get into trouble
# What a hostile file may do to its decoder, by the name of the fault: calls that are made in the child.
CHILD_CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "hang": (time.sleep, (600,)),
    "swell": (operator.mul, ("x", 3 << 30)),
    "crash": (ctypes.string_at, (0,)),
}


def _put(module: ModuleType, **values: Any) -> None:
    """Put something else in the place of a module's names."""
    vars(module).update(values)


def slow(seconds: float) -> None:
    """Each video takes so much longer to decode."""
    plain = vars(longvlm.jobs.index.run)["Watch"]

    class Watch(plain):  # type: ignore[misc,valid-type]  # as it is by now
        def __call__(self, plan: pa.Table) -> Any:
            for frames in super().__call__(plan):
                time.sleep(seconds)
                yield frames

    _put(longvlm.jobs.index.run, Watch=Watch)


def poison(names: dict[str, str]) -> None:
    """The files so named do to their decoder what `CHILD_CALLS` says; deadline and memory limit are close."""
    deadline_s = min(CHILD_DEADLINE_S.get(call, DECODE_DEADLINE_S) for call in names.values())

    class Poisoned(Decoder):
        def probe(self, path: str, mode: video.Mode = "exact", max_gap_s: float | None = None, **options: Any) -> Any:
            if call := names.get(Path(path).name):
                function, arguments = CHILD_CALLS[call]
                return self.call(function, *arguments)
            return super().probe(path, mode, max_gap_s, **options)

    class Watch(stages.Watch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.decoder = Poisoned(deadline_s, CHILD_MEMORY_BYTES)

    _put(longvlm.jobs.index.run, Watch=Watch)


def scratch(folder: str) -> None:
    """Downloads go to this folder."""
    plain = vars(longvlm.jobs.index.run)["Watch"]

    class Watch(plain):  # type: ignore[misc,valid-type]  # as it is by now
        def __init__(self, *args: Any) -> None:
            tempfile.tempdir = folder
            super().__init__(*args)

    _put(longvlm.jobs.index.run, Watch=Watch)


def nodes_noted(folder: str) -> None:
    """A node that decodes leaves a file with its id in this folder."""
    import ray  # other drivers may do without

    plain = vars(longvlm.jobs.index.run)["Watch"]

    class Watch(plain):  # type: ignore[misc,valid-type]  # as it is by now
        def __call__(self, plan: pa.Table) -> Any:
            for frames in super().__call__(plan):
                Path(folder, ray.get_runtime_context().get_node_id()).touch()
                yield frames

    _put(longvlm.jobs.index.run, Watch=Watch)


def encoder_dies(marker: str) -> None:
    """The first encoder dies in the middle of its second batch."""

    class Encode(stages.Encode):
        calls = 0

        def _encode(self, frames: pa.Table, keys: list[str]) -> pa.Table:
            self.calls += 1
            if self.calls == 2 and not os.path.exists(marker):  # noqa: PTH110 - nothing else to import there
                Path(marker).touch()
                self.stage.begin(keys)
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._encode(frames, keys)

    _put(longvlm.jobs.index.run, Encode=Encode)


def dies_between_commits(number: int) -> None:
    """The driver is gone after its so-manieth commit of tokens and segments, before the rows that make them exist."""
    plain = Store._append  # noqa: SLF001 - through which both ways of committing rows go
    left = [number]

    def append(self: Store, table: str, rows: pa.Table, *others: Any) -> pa.Table:
        if table == "videos" and rows.num_rows:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, table, rows, *others)

    Store._append = append  # type: ignore[method-assign, assignment]  # noqa: SLF001


def commits_every(seconds: float) -> None:
    """What is finished waits for longer to be committed."""
    _put(longvlm.jobs.cluster.commits, COMMIT_EVERY_S=seconds)


def stall(seconds: float) -> None:
    """A run in which nothing moves is given up sooner than after half an hour."""
    _put(longvlm.jobs.cluster.watch, _STALL_S=seconds, _STALL_POLL_S=1.0)


FAULTS: dict[str, Callable[[Any], None]] = {
    "slow": slow,
    "poison": poison,
    "scratch": scratch,
    "nodes_noted": nodes_noted,
    "encoder_dies": encoder_dies,
    "dies_between_commits": dies_between_commits,
    "commits_every": commits_every,
    "stall": stall,
}


def main() -> None:
    """Install the faults and run the command."""
    from longvlm.jobs import cli

    _put(longvlm.jobs.cluster.commits, COMMIT_EVERY_S=COMMIT_EVERY_S)
    changed = {"units_per_shard": UNITS_PER_SHARD}
    _put(longvlm.jobs.index.run, for_index=lambda *facts, **options: replace(for_index(*facts, **options), **changed))
    for name, told in json.loads(sys.argv[1]).items():
        FAULTS[name](told)
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
