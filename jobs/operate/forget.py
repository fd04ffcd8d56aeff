"""The forget job: erasure of named videos from the store, down to the last byte."""

import csv
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from pyarrow import parquet

from longvlm.jobs.runs import record_run
from longvlm.pipeline.source.copies import canonical_uri, locate
from longvlm.pipeline.store.catalog import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.erase import Erased, erase, unknown_videos
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id, video_id


@dataclass
class ForgetReport:
    """The report of an erasure."""

    run_id: str
    erased: Erased
    wall_s: float

    @property
    def stopped(self) -> str | None:
        """Why not everything is erased yet."""
        if not self.erased.files_under_way:
            return None
        return (
            f"{self.erased.files_under_way} files of a run under way hold the videos too; they are hidden, and gone "
            "when the same command is run again after it"
        )

    def as_json(self) -> dict[str, Any]:
        """The counts of the run."""
        return {**asdict(self.erased), "wall_s": round(self.wall_s, 3), "stopped": self.stopped, "run_id": self.run_id}


def run_forget(store_uri: str, uris: list[str]) -> ForgetReport:
    """Forget videos by their URIs. Nothing is erased where one of them is unknown.

    Raises:
        InputError: no uri is given, or one that the store never saw.
    """
    started = time.time()
    if not uris:
        raise InputError("there is no video to forget; name some with --uri U or --file F.")
    store = Store.open(store_uri)
    by_id = {video_id(canonical_uri(*locate(uri))): uri for uri in uris}
    if unknown := [by_id[video] for video in unknown_videos(store, list(by_id))]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"the store never saw {min(unknown)}{more}; nothing was erased. Name videos as the column uri does."
        )
    run_id = new_run_id()
    report = ForgetReport(run_id, erase(store, list(by_id), run_id), 0.0)
    write_index_duckdb(store.uri, store.pin())
    report.wall_s = time.time() - started
    record_run(store, "forget", report.as_json(), {})
    return report


def read_uris(file: str) -> list[str]:
    """Read URIs from a file: a line each, or the column `uri` of CSV or parquet. InputError if it cannot be read."""
    suffix = Path(file).suffix.lower()
    try:
        with fsspec.open(file, "rb") as source:
            if suffix == ".parquet":
                return [uri for uri in parquet.read_table(source, columns=["uri"])["uri"].to_pylist() if uri]
            lines = source.read().decode().splitlines()
        if suffix == ".csv":
            return [row["uri"].strip() for row in csv.DictReader(lines) if row["uri"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{file} cannot be read ({type(error).__name__}: {error}); it must have a uri a line, or a column uri."
        ) from error
    return [line.strip() for line in lines if line.strip()]
