"""The forget job: erasure of named videos from the store, down to the last byte."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.figures import counted
from longvlm.jobs.runs import close_run
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.moments import drop_moments
from longvlm.pipeline.store.upkeep.erase import Erased, Foreseen, erase, foresee, unknown_videos
from longvlm.pipeline.store.upkeep.versions import versioned
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
        if not (left := self.erased.still_there):
            return None
        more = f" and {counted(len(left) - 1, 'other thing')}" if len(left) > 1 else ""
        return (
            f"not all of them is gone: {left[0]}{more}; they are hidden, and the same command, or the next "
            "maintenance, goes on from there"
        )

    def as_json(self) -> dict[str, Any]:
        """The counts of the run."""
        return {**asdict(self.erased), "wall_s": round(self.wall_s, 3), "stopped": self.stopped, "run_id": self.run_id}


@dataclass(frozen=True)
class ForgetOrder:
    """Videos that are to be forgotten: of one store, and all known to it. Make one with `find_videos`."""

    store: Store
    video_ids: list[str]

    def foresee(self) -> Foreseen:
        """What would be erased."""
        return foresee(self.store, self.video_ids)

    @property
    def kept_elsewhere(self) -> str | None:
        """What the store's bucket keeps of deleted files, in a sentence."""
        return versioned(self.store.uri)


def find_videos(store_uri: str, uris: list[str]) -> ForgetOrder:
    """Find videos by their URIs.

    Raises:
        InputError: no uri is given, or one that the store never saw.
    """
    if not uris:
        raise InputError("there is no video to forget; name some with --uri U or --file F.")
    store = Store.open(store_uri)
    by_id = {video_id(canonical_uri(*locate(uri))): uri for uri in uris}
    if unknown := [by_id[video] for video in unknown_videos(store, list(by_id))]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"the store never saw {min(unknown)}{more}; nothing was erased. Name videos as the column uri does."
        )
    return ForgetOrder(store, list(by_id))


def run_forget(order: ForgetOrder) -> ForgetReport:
    """Forget videos."""
    started = time.time()
    run_id = new_run_id()
    doing(f"erasing {counted(len(order.video_ids), 'video')}")
    erased = erase(order.store, order.video_ids, run_id)
    drop_moments(order.store.pin())
    report = ForgetReport(run_id, erased, time.time() - started)
    if not erased.versions_deleted and (said := order.kept_elsewhere):
        report.notes.append(said)
    if erased.videos_torn:
        report.notes.append(
            f"damaged pages were not copied; {counted(erased.videos_torn, 'other video')} will be indexed again"
        )
    close_run(order.store, "forget", report)
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
