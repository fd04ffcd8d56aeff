"""Logs for machines: a JSON object a line, on standard error.

Workers always write them, into Ray's log file of their process. A driver does where LONGVLM_LOG says from which level
on (LONGVLM_LOG=info); without it a person sees the job's own few lines and nothing else. A line has time, level and
message, and of run_id, job, stage, video_id, uri and error_code what is known. What could be a secret in an address
(user:password@, the query of a signed address) is left out of every line.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from longvlm.schemas.errors import InputError

LEVELS = ("debug", "info", "warning")
_FIELDS = ("run_id", "job", "stage", "video_id", "uri", "question_id", "error_code", "counts")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"\?[^\s'\"?=]+=[^\s'\"]*")

log = logging.getLogger("longvlm")
log.addHandler(logging.NullHandler())  # without it, Python would print warnings where nobody asked for logs
log.propagate = False


def redact(text: str) -> str:
    """The text without the credentials that addresses in it carry."""
    return _QUERY.sub("?...", _USER.sub("", text))


class _JsonLines(logging.Formatter):
    """A record as one line of JSON; `common` stands on every line."""

    def __init__(self, common: dict[str, str]) -> None:
        super().__init__()
        self.common = common

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self.common,
            **{name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None},
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps({name: redact(value) if isinstance(value, str) else value for name, value in said.items()})


def _write_to_stderr(level: str, common: dict[str, str]) -> None:
    """Log to standard error from now on, in this process; said again, it replaces what was said before."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines(common))
    log.addHandler(handler)
    log.setLevel(level.upper())


def start_driver() -> None:
    """Log what LONGVLM_LOG asks for. Raises InputError if that is no level."""
    level = os.environ.get("LONGVLM_LOG", "").lower()
    if level and level not in LEVELS:
        raise InputError(f"LONGVLM_LOG is {level}; set it to one of {', '.join(LEVELS)}, or leave it out.")
    if level:
        _write_to_stderr(level, {})


def start_worker(run_id: str, stage: str) -> None:
    """Log from this worker process, into its file among Ray's logs; every line says the run and the stage."""
    _write_to_stderr("info", {"run_id": run_id, "stage": stage})


def begun(job: str, run_id: str, **facts: str) -> None:
    """A run begins; `facts` are what it works on."""
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    log.info("%s begins: %s", job, told, extra={"job": job, "run_id": run_id})


def ended(job: str, run_id: str, counts: dict[str, Any], stopped: str | None) -> None:
    """A run ended, with its counts; a stop before its end is a warning."""
    extra = {"job": job, "run_id": run_id, "counts": counts}
    if stopped:
        log.warning("%s stopped: %s", job, stopped, extra=extra)
    else:
        log.info("%s ended", job, extra=extra)


def committed(job: str, run_id: str | None, num_rows: int) -> None:
    """Rows are part of the store from now on."""
    log.info("committed %d rows", num_rows, extra={"job": job, "run_id": run_id})


def failures(rows: Iterable[dict[str, Any]]) -> None:
    """A line for each of some rows (of videos, units or answers) that has an error_code."""
    for row in rows:
        if row.get("error_code"):
            log.warning("%s", row["error"], extra={name: row[name] for name in _FIELDS if row.get(name)})
