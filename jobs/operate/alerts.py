"""Alerts: named queries over a store; one that returns rows is posted to a webhook."""

import itertools
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import duckdb
import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.query.rows import json_lines
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError

MAX_ROWS = 20  # of an alert are posted, and their number
_ROWS_IN_TEXT = 3
_WAITS_S = (1.0, 5.0)  # between the tries of one post
_TIMEOUT_S = 15.0
QUERY_S = 300.0  # that one alert's query may take
_NAME = re.compile(r"^--[ \t]*name:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Alert:
    """An alert: a named SQL query, of which every row is bad news."""

    name: str
    sql: str


@dataclass
class AlertsReport:
    """The report of the alerts: which were raised and posted."""

    raised: dict[str, int] = field(default_factory=dict)  # name -> number of rows
    posted: int = 0
    problems: list[str] = field(default_factory=list)  # alerts that cannot run, posts that did not get through

    def as_json(self) -> dict[str, Any]:
        """The part `alerts` of a nightly's counts."""
        stopped = "; ".join(self.problems) or None
        return {"raised": self.raised, "num_raised": len(self.raised), "posted": self.posted, "stopped": stopped}


def read_alerts(path: str | None) -> list[Alert]:
    """Read the alerts of a file, or those that come with the project.

    Raises:
        InputError: it cannot be read, a query has no name or another's, or is not one SELECT.
    """
    try:
        text = (Path(path) if path else files("longvlm.schemas") / "alerts.sql").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the alerts {path} cannot be read ({error}); name a file of SQL.") from error
    before, *parts = _NAME.split(text)
    alerts = [Alert(name, sql) for name, sql in zip(parts[::2], parts[1::2], strict=True)]
    if not alerts or re.sub(r"--.*", "", before).strip():
        raise InputError(f"the alerts {path} have a query without a name; put a line `-- name: ...` above each.")
    if len({alert.name for alert in alerts}) < len(alerts):
        raise InputError(f"two of the alerts {path} have the same name; give each its own.")
    with duckdb.connect() as con:
        for alert in alerts:
            try:
                catalog.check_select(con, alert.sql)
            except (InputError, duckdb.Error) as error:
                reason = catalog.first_line(error)
                raise InputError(f"the alert {alert.name!r} must be one SELECT statement ({reason}).") from error
    return alerts


def check_webhook(url: str | None) -> None:
    """Raise InputError for what is no http address; what it says is a secret and not repeated."""
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        raise InputError("the webhook must be an http:// or https:// address.")


def run_alerts(
    snapshot: Snapshot, run: dict[str, Any], alerts: list[Alert], about: str, url: str | None
) -> AlertsReport:
    """Run all alerts, and post those that return rows. One that fails keeps none of the others back.

    They read the store and nothing else, since what they find leaves the house.

    Args:
        snapshot: of the store.
        run: the row of the run under way, as it will stand in `runs`.
        alerts: from `read_alerts`.
        about: the store's address, for who reads the post.
        url: of the webhook; None posts nothing.
    """
    report = AlertsReport()
    with catalog.connect(snapshot, apart=True) as con:
        con.register("run_under_way", pa.Table.from_pylist([run], tables.RUNS))
        con.execute(
            "CREATE OR REPLACE VIEW runs AS SELECT *, make_timestamp(seq) AS finished_at "
            "FROM (FROM ledger_runs UNION ALL BY NAME FROM run_under_way)"
        )
        access.seal(con, snapshot)
        for alert in alerts:
            try:
                with _interrupted(con, QUERY_S):
                    found = json_lines(con, catalog.select(con, alert.sql))
                    rows = [json.loads(line) for line in itertools.islice(found, MAX_ROWS)]
                    num_rows = len(rows) + sum(1 for _ in found)
            except duckdb.InterruptException:
                report.problems.append(f"the alert {alert.name!r} ran for more than {QUERY_S:.0f} s and was ended")
                continue
            except duckdb.Error as error:
                report.problems.append(f"the alert {alert.name!r} cannot run: {catalog.without_place(error)}")
                continue
            if not num_rows:
                continue
            report.raised[alert.name] = num_rows
            if url:
                problem = post_webhook(url, webhook_payload(alert.name, rows, num_rows, about, run["run_id"]))
                report.posted += problem is None
                report.problems += [f"the alert {alert.name!r} was not posted: {problem}"] if problem else []
    return report


@contextmanager
def _interrupted(con: duckdb.DuckDBPyConnection, after_s: float) -> Iterator[None]:
    """End what a connection does in the body after so many seconds, with duckdb.InterruptException."""
    timer = threading.Timer(after_s, con.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def webhook_payload(name: str, rows: list[dict[str, Any]], num_rows: int, about: str, run_id: str) -> dict[str, Any]:
    """The JSON that is posted to a webhook: `text` is what chat services show, the rest is for programs."""
    told = [", ".join(f"{key} {value}" for key, value in row.items()) for row in rows[:_ROWS_IN_TEXT]]
    more = ["..."] if num_rows > _ROWS_IN_TEXT else []
    text = "\n".join([f"longvlm: {name} ({about})", *told, *more])
    return {"text": text, "alert": name, "store": about, "run_id": run_id, "rows": rows, "num_rows": num_rows}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect handler that follows none: a post would arrive as a GET, and a sign-in page pass for success."""

    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: it becomes an HTTPError."""


def post_webhook(url: str, body: dict[str, Any]) -> str | None:
    """Post JSON, a bounded number of times; returns why it did not get through, if it did not.

    The standard library does, since no answer is read and nothing is kept open. The reason never repeats the address,
    whose path is the password of most services.
    """
    opener = urllib.request.build_opener(_NoRedirects)
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    problem = None
    for wait_s in (0.0, *_WAITS_S):
        time.sleep(wait_s)
        try:
            with opener.open(request, timeout=_TIMEOUT_S):
                return None
        except urllib.error.HTTPError as error:
            problem = f"{urlsplit(url).hostname} answered {error.code} {error.reason}"
            if error.code not in _TRY_AGAIN:
                return problem
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            problem = f"{urlsplit(url).hostname} cannot be reached ({reason})"
    return problem
