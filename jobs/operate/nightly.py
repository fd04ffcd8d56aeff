"""The nightly job: index what changed, prune, ask the standing questions, maintain the store, and raise alerts.

1 index      what is new or changed, what failed for a passing reason, what is gone    as `longvlm index --prune`
2 answer     the standing questions, where they have no answer yet                     as `longvlm answer`
3 maintain   compaction and vacuum                                                     as `longvlm maintain`
4 alerts     named queries; those that return rows are posted
5 record     one row in `runs`

A part that stops does not keep the later ones from running: what is indexed can be asked about, a store wants tidying
even where a bucket is out of reach, and somebody has to be told. Only Ctrl-C, and another run that took over, end all.
"""

import hashlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from deltalake.exceptions import DeltaError

from longvlm.jobs.answer.run import AnswerOrder, answer_questions
from longvlm.jobs.cluster import logs
from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.executor import StageError
from longvlm.jobs.cluster.resources import MIN_RETENTION_HOURS
from longvlm.jobs.index.order import IndexOrder, check_order
from longvlm.jobs.index.run import index_source, take_stock
from longvlm.jobs.limits import INTERRUPTED
from longvlm.jobs.operate.alerts import Alert, check_webhook, read_alerts, run_alerts
from longvlm.jobs.operate.maintain import maintain_store
from longvlm.jobs.operate.standstill import Standstill
from longvlm.jobs.runs import close_run
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.source.scratch import scratch_folder
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.lease import Lease
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.uris import locate
from longvlm.schemas import clock
from longvlm.schemas.errors import ErrorCode, InputError
from longvlm.schemas.identity import new_run_id

# What fails for these may pass by itself (they are the TransientErrors); all else fails again until the file changes.
RETRIED = (ErrorCode.NETWORK, ErrorCode.CREDENTIALS, ErrorCode.NO_SPACE, ErrorCode.LOST)
_STOPS = (InputError, OSError, DeltaError, duckdb.Error, StageError)  # what the world does to a part


@dataclass(frozen=True)
class NightlyOrder:
    """The order of a nightly run."""

    index: IndexOrder  # also names the store, the model, and the hours for all parts together
    questions: str | None = None  # a question file; its owner keeps its versions
    alerts: str | None = None  # a file of named queries; None: those that come with the project
    webhook: str | None = None
    retention_hours: float = MIN_RETENTION_HOURS


@dataclass
class NightlyReport:
    """The report of a nightly run."""

    started_s: float = field(default_factory=time.time)
    run_id: str = field(default_factory=new_run_id)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # counts by part; `stopped` says why one stopped
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # by part.stage
    questions_sha256: str | None = None  # which version of the question file was asked
    interrupted: str | None = None  # why all of it ended early
    wall_s: float = 0.0
    notes: list[str] = field(default_factory=list)  # what a person should know, and no result depends on

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm nightly --json` ends with, and the counts of its row in `runs`."""
        said = {"questions_sha256": self.questions_sha256, "wall_s": round(self.wall_s, 3), "stopped": self.interrupted}
        return {**self.parts, **said, "run_id": self.run_id}

    @property
    def stopped(self) -> str | None:
        """Why all of it stopped, or else what of it."""
        told = [f"{name}: {part['stopped'].rstrip('.')}" for name, part in self.parts.items() if part.get("stopped")]
        return self.interrupted or "; ".join(told) or None


def run_nightly(order: NightlyOrder) -> NightlyReport:
    """Run one night's work under the lease `nightly`, and its row in `runs`, however it ended.

    Raises:
        InputError: the orders cannot be carried out; nothing is written.
        LeaseHeldError: another nightly is at work on this store; nothing is done.
    """
    queries = read_alerts(order.alerts)
    check_webhook(order.webhook)
    if order.retention_hours < MIN_RETENTION_HOURS:
        raise InputError(f"--retention-hours must be {MIN_RETENTION_HOURS:g} at least, or runs under way lose files.")
    questions = read_questions(order.questions) if order.questions else None
    order = replace(order, index=replace(order.index, prune=True, retry_failed=RETRIED))
    check_order(order.index)
    if Store.find(order.index.store) is None:
        _check_first_night(order.index)
    report = NightlyReport()
    if order.questions:
        fs, path = locate(order.questions)
        report.questions_sha256 = hashlib.sha256(fs.cat_file(path)).hexdigest()
    with Lease(order.index.store, "nightly", _interrupt, Standstill()) as lease:
        logs.begun("nightly", report.run_id, source=order.index.source.uri, store=order.index.store)
        try:
            _all_parts(order, questions, queries, report)
        except KeyboardInterrupt:
            report.interrupted = lease.lost or INTERRUPTED
        except Exception as error:
            report.interrupted = f"{type(error).__name__}: {error}"
            raise
        finally:
            _record(order.index.store, report)
    return report


def _interrupt() -> None:
    """What Ctrl-C does: the job at work keeps what is finished, and ends."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _check_first_night(order: IndexOrder) -> None:
    """Raise InputError where there would be nothing to index, before a lease makes the store's folder."""
    with scratch_folder() as scratch:
        *_, changes = take_stock(order, Path(scratch) / "listing.parquet", Counter())
        changes.close()


def _all_parts(order: NightlyOrder, questions: pa.Table | None, queries: list[Alert], report: NightlyReport) -> None:
    """Parts 1 to 4."""
    with _part("index", report) as counts:
        indexed, _ = index_source(order.index)
        _take_over("index", indexed, counts, report)
    if questions is not None:
        with _part("answer", report) as counts:
            _answer(order.index, questions, counts, report)
    with _part("maintain", report) as counts:
        counts.update(maintain_store(Store.open(order.index.store), order.retention_hours).as_json())
    with _part("alerts", report) as counts:
        doing("asking for alerts")
        store = Store.open(order.index.store)
        report.wall_s = time.time() - report.started_s
        row = {"run_id": report.run_id, "job": "nightly", "counts": json.dumps(report.as_json())}
        timed = {**row, "wall_s": report.wall_s, "seq": clock.now_us()}
        counts.update(run_alerts(store.pin(), timed, queries, store.uri, order.webhook).as_json())


@contextmanager
def _part(name: str, report: NightlyReport) -> Iterator[dict[str, Any]]:
    """A part's counts, which the body fills; what stops it is one of them."""
    counts = report.parts.setdefault(name, {})
    try:
        yield counts
    except _STOPS as error:
        logs.log.exception("%s stopped", name, extra={"run_id": report.run_id, "job": "nightly"})
        counts["stopped"] = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _take_over(name: str, found: Any, counts: dict[str, Any], report: NightlyReport) -> None:
    """Note what a job reports as a part's counts and stages. Raises KeyboardInterrupt if that is what ended it."""
    counts |= found.as_json()
    report.stages |= {f"{name}.{stage}": figures for stage, figures in found.stages.items()}
    if found.stopped == INTERRUPTED:
        raise KeyboardInterrupt


def _answer(order: IndexOrder, questions: pa.Table, counts: dict[str, Any], report: NightlyReport) -> None:
    """Part 2, in what is left of the time."""
    left = None if order.max_hours is None else order.max_hours - (time.time() - report.started_s) / 3600
    if left is not None and left <= 0:
        counts["out_of_time"] = True
        return
    with catalog.connect(Store.open(order.store).pin(("videos",)), ("live_videos",)) as con:
        if not con.execute("SELECT count(*) FROM live_videos").fetchall()[0][0]:
            counts["asked"] = 0  # an empty bucket is nothing to be alarmed about
            return
    asked = AnswerOrder(
        order.store,
        questions,
        model=order.model,
        max_hours=left,
        ray_address=order.ray_address,
        show_progress=order.show_progress,
    )
    _take_over("answer", answer_questions(asked), counts, report)


def _record(store_uri: str, report: NightlyReport) -> None:
    """Part 5; where not even the tables could be made, there is nowhere to."""
    report.wall_s = time.time() - report.started_s
    logs.ended("nightly", report.run_id, report.as_json(), report.stopped)
    store = Store.find(store_uri)
    if store is not None:
        close_run(store, "nightly", report)
