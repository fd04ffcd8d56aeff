"""The end of every run: its row in the table `runs`, small files merged, and `index.duckdb` brought up to date."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import duckdb
import pyarrow as pa
from deltalake.exceptions import DeltaError

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.retry import persist
from longvlm.jobs.cluster.trouble import trouble
from longvlm.pipeline.store.catalog import first_line
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.pipeline.uris import is_local
from longvlm.schemas import clock, tables
from longvlm.schemas.errors import InputError

# what may keep a store from being tidied: a damaged file, a full or read-only disk, a network
_TROUBLE = (InputError, DeltaError, duckdb.Error, OSError)
VERSIONS = ("longvlm-index", "ray", "torch", "transformers", "pyarrow", "deltalake", "duckdb")


class Report(Protocol):
    """What the reports of all jobs have."""

    run_id: str
    wall_s: float
    notes: list[str]  # what a person should know, and no result depends on

    @property
    def stages(self) -> Mapping[str, Mapping[str, float]]:
        """Per stage what its workers did; `busy_s`, wall seconds, at least."""

    @property
    def stopped(self) -> str | None:
        """Why the run did not get to its end; None if it did."""

    def as_json(self) -> dict[str, Any]:
        """The counts of the run with run_id, wall_s and stopped: what `--json` ends with."""


def close_run(store: Store, job: str, report: Report, counts: dict[str, Any] | None = None) -> None:
    """End a run: note it in the table `runs`, merge small files, and bring index.duckdb up to date.

    What a run has finished stays finished: what cannot be tidied afterwards becomes one of its notes. Arguments are
    those of `record_run`.
    """
    doing("tidying up the store")
    record_run(store, job, report, counts)
    try:
        merge_small_files(store)
    except _TROUBLE as error:  # they do no harm until the next job
        report.notes.append(f"small files were not merged: {trouble(error) or first_line(error)}")
    refresh_index(store, report.notes)


def record_run(store: Store, job: str, report: Report, counts: dict[str, Any] | None = None) -> None:
    """Append a run that ended to the table `runs`.

    Args:
        store: of the run.
        job: its name.
        report: of the run.
        counts: what the table keeps of it; by default all that it reports.
    """
    row = {
        "run_id": report.run_id,
        "job": job,
        "counts": json.dumps(report.as_json() if counts is None else counts),
        "wall_s": round(report.wall_s, 3),
        "stage_s": json.dumps({name: round(stage["busy_s"], 3) for name, stage in report.stages.items()}),
        "versions": _versions(),
        "seq": clock.now_us(),
    }
    persist(store.uri, store.append, "runs", pa.Table.from_pylist([row], schema=tables.RUNS))


@cache  # reading seven packages' metadata takes longer than the commit
def _versions() -> str:
    return json.dumps({name: version(name) for name in VERSIONS})


def refresh_index(store: Store, notes: list[str]) -> None:
    """Bring index.duckdb up to date, which a local store has; why it could not be goes into the notes of a run."""
    if not is_local(store.uri):  # nothing would be written, and to pin costs a bucket some requests a table
        return
    try:
        write_index_duckdb(store.uri, store.pin())
    except _TROUBLE as error:  # the file is a convenience, the store itself is whole
        notes.append(f"index.duckdb was left as it was: {trouble(error) or first_line(error)}")
