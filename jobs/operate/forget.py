"""The forget job: erasure of named videos from the store, down to the last byte."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.figures import counted
from longvlm.jobs.runs import close_run
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.erase import Erased, erase, unknown_videos
from longvlm.pipeline.table_files import Column, is_table, read_batches
from longvlm.pipeline.text_files import UserFile, read_lines
from longvlm.pipeline.uris import canonical_uri, locate
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id, video_id


@dataclass
class ForgetReport:
    """The report of an erasure."""

    run_id: str
    erased: Erased
    wall_s: float
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # it has none
    notes: list[str] = field(default_factory=list)  # what a person should know, and no result depends on

    @property
    def stopped(self) -> str | None:
        """Why not everything is erased yet."""
        if not self.erased.files_under_way:
            return None
        held = counted(self.erased.files_under_way, "file")
        return (
            f"a run under way still holds some of the videos, in {held}; they are "
            "hidden, and gone when the same command is run again after it"
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
    doing(f"erasing {counted(len(by_id), 'video')}")
    erased = erase(store, list(by_id), run_id)
    report = ForgetReport(run_id, erased, time.time() - started)
    close_run(store, "forget", report)
    return report


def read_uris(file: str) -> list[str]:
    """Read URIs from a file: the column `uri` of a file of rows (CSV, JSON, JSONL, parquet), else a line each.

    Raises:
        InputError: the file cannot be read, or has no column `uri`.
    """
    listed = UserFile(file, "list of videos")
    if not is_table(file):
        return [uri for line in read_lines(listed) if (uri := line.strip())]
    batches = read_batches(listed, {"uri": Column(("uri",), "text", required=True)})
    return [uri for batch in batches for uri in batch["uri"].to_pylist() if uri]
