"""The end of every job: its row in the table `runs`, and the views of `index.duckdb` brought up to date."""

import json
import time
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError

VERSIONS = ("longvlm-index", "ray", "torch", "transformers", "pyarrow", "deltalake", "duckdb")


def record_run(store: Store, job: str, counts: dict[str, Any], stages: dict[str, dict[str, float]]) -> None:
    """Append the finished job to the table `runs`; `counts` carries its run_id and wall_s."""
    row = {
        "run_id": counts["run_id"],
        "job": job,
        "counts": json.dumps(counts),
        "wall_s": counts["wall_s"],
        "stage_s": json.dumps({name: round(stage["busy_s"], 3) for name, stage in stages.items()}),
        "versions": json.dumps({name: version(name) for name in VERSIONS}),
        "seq": time.time_ns() // 1000,
    }
    store.append("runs", pa.Table.from_pylist([row], schema=tables.RUNS))


def refresh_index(store: Store, notes: list[str]) -> None:
    """Bring index.duckdb up to date; why it could not be goes into the notes of a run."""
    try:
        catalog.write_index_duckdb(store.uri, store.pin())
    except InputError as error:  # a file that the log names is gone; what was answered stays answered
        notes.append(f"index.duckdb was left as it was: {error}")
