"""What pages say of runs: the last ones with their counts, and how those of a job went over time."""

import json
from dataclasses import dataclass
from typing import Any

from longvlm.jobs.figures import spell_figure, spell_seconds
from longvlm.jobs.serve.pinned import PinnedStore, Row

MAX_RUNS = 100
TREND_RUNS = 40  # of each job, that stand beside each other
_NOT_COUNTS = ("wall_s", "run_id")
# What a run is about, where it counts that: the first of these; of a night that of its part of the same name.
_DONE = ("indexed", "answered", "verdicts_new", "listed", "checked")


@dataclass(frozen=True)
class TrendBar:
    """One run in a row of bars."""

    share: float  # of the highest
    label: str  # when, and how much


@dataclass(frozen=True)
class Trend:
    """A figure of the last runs of a job, oldest first."""

    name: str
    bars: list[TrendBar]
    last: str
    highest: str


@dataclass(frozen=True)
class JobTrends:
    """How a job went: how much it did, what failed, how long it took."""

    job: str
    num_runs: int
    trends: list[Trend]


def last_runs(pinned: PinnedStore) -> list[Row]:
    """The last runs, newest first: finished_at, job, run_id, wall_s, stopped, counts (numbers but 0), and alerts.

    A night's counts are those of its parts, named `part: count`; `alerts` are the rows that each alert found.
    """
    rows = _runs(pinned, f"ORDER BY seq DESC, run_id LIMIT {MAX_RUNS}")
    for row in rows:
        row["counts"] = {name: number for name, number in row["counts"].items() if number}
    return rows


def _runs(pinned: PinnedStore, which: str) -> list[Row]:
    rows = pinned.rows(f"SELECT finished_at, job, run_id, wall_s, counts FROM runs {which}")
    for row in rows:
        counts: dict[str, Any] = json.loads(row["counts"] or "{}")
        parts = {name: part for name, part in counts.items() if isinstance(part, dict)}
        said = [counts.get("stopped"), *(part.get("stopped") for part in parts.values())]
        row["stopped"] = "; ".join(str(why) for why in said if why)
        row["alerts"] = parts.pop("alerts", {}).get("raised", {})
        row["counts"] = _numbers(counts)
        for part_name, part in parts.items():
            row["counts"] |= {f"{part_name}: {name}": number for name, number in _numbers(part).items()}
    return rows


def _numbers(counts: dict[str, Any]) -> dict[str, float]:
    return {
        name: number
        for name, number in counts.items()
        if isinstance(number, int | float) and not isinstance(number, bool) and name not in _NOT_COUNTS
    }


def trends_of_runs(pinned: PinnedStore) -> list[JobTrends]:
    """What the last runs of each job did, failed at and took; jobs that ran once are left out."""
    newest = (
        f"QUALIFY row_number() OVER (PARTITION BY job ORDER BY seq DESC, run_id) <= {TREND_RUNS} ORDER BY seq, run_id"
    )
    by_job: dict[str, list[Row]] = {}
    for row in _runs(pinned, newest):
        by_job.setdefault(row["job"] or "", []).append(row)
    return [_of_job(job, rows) for job, rows in sorted(by_job.items()) if len(rows) > 1]


def _of_job(job: str, rows: list[Row]) -> JobTrends:
    found = [_trend("took", rows, [row["wall_s"] or 0.0 for row in rows], spell_seconds)]
    counted = {name for row in rows for name in row["counts"]}
    done = [name for wanted in _DONE for name in sorted(counted) if name.rpartition(": ")[2] == wanted][:1]
    failed = [name for name in sorted(counted) if name.rpartition(": ")[2] == "failed"]
    for name in [*done, *failed]:
        values = [row["counts"].get(name, 0) for row in rows]
        found.append(_trend(name, rows, values, lambda number, name=name: spell_figure(name, number)[1]))
    return JobTrends(job, len(rows), found)


def _trend(name: str, rows: list[Row], values: list[float], spell: Any) -> Trend:
    highest = max(values)
    bars = [
        TrendBar(value / (highest or 1), f"{row['finished_at']:%Y-%m-%d %H:%M}: {spell(value)}")
        for row, value in zip(rows, values, strict=True)
    ]
    return Trend(name.replace("_", " "), bars, spell(values[-1]), spell(highest))


def failures_of_runs(pinned: PinnedStore) -> list[Row]:
    """What now stands failed, by the run that said so and by code, newest first: run_id, error_code, number."""
    return pinned.rows(
        "SELECT run_id, error_code, count(*) AS number FROM failures GROUP BY ALL "
        "ORDER BY run_id DESC, number DESC, error_code LIMIT 200"
    )
