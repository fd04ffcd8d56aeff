"""The accounting of an index run: every planned video ends as exactly one row, whatever Ray reports."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import num_parts
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Listed
from longvlm.schemas import clock, tables
from longvlm.schemas.errors import OWN_FAILURES, ErrorCode
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.recipe import TIME_RULE
from longvlm.schemas.rows import OutcomeRow, PlanRow, WorkRow
from longvlm.schemas.tables import ALL_UNITS

_OUTAGES = (ErrorCode.NETWORK, ErrorCode.NO_SPACE)  # that may be over when a part of a video is tried again
_FACTS = ("duration_s", "fps", "width", "height", "num_frames", "codec", "decoder", "num_segments")


@dataclass
class Account:
    """Videos planned in one wave, and the outcomes of their units as they come in.

    A long video may be shared: the decoder that began it left the rest to others, as parts of the same write. Where
    these do not find the same video, or do not get to its end, it is planned again for one decoder alone.
    """

    recipe: str
    run_id: str
    planned: dict[str, PlanRow] = field(default_factory=dict)  # by write_id, until settled
    landed: dict[str, dict[int, OutcomeRow]] = field(default_factory=dict)  # by write_id and unit
    shared: dict[str, float] = field(default_factory=dict)  # by write_id: CPU milliseconds that a unit takes to decode
    alone: set[str] = field(default_factory=set)  # video_ids of those that could not be shared
    settled: Counter[str] = field(default_factory=Counter)  # videos that were indexed, or failed by code

    def plan(self, work: Sequence[WorkRow]) -> pa.Table:
        """Plan videos: a new write_id and one more attempt each. Returns tables.PLAN."""
        rows: list[PlanRow] = [
            {
                **video,
                "write_id": new_write_id(),
                "attempts": (video["attempts"] or 0) + 1,
                "first_unit": None,
                "end_unit": ALL_UNITS if video["video_id"] in self.alone else None,
            }
            for video in work
        ]
        self.planned |= {row["write_id"]: row for row in rows}
        return pa.Table.from_pylist(rows, schema=tables.PLAN)

    def add(self, outcomes: pa.Table) -> list[dict[str, Any]]:
        """Take in tables.OUTCOMES; returns the VIDEOS rows (without seq) of the videos that this settles."""
        settled = []
        rows: list[OutcomeRow] = outcomes.to_pylist()
        for outcome in rows:
            write_id = outcome["write_id"]
            if write_id not in self.planned:  # failed by an earlier unit already
                continue
            if write_id in self.shared and outcome["error_code"] in _OUTAGES:  # of a part, which is as good as lost
                continue
            units = self.landed.setdefault(write_id, {})
            units[outcome["unit"]] = outcome
            if outcome["error_code"]:
                settled.append(self._settle(write_id, outcome, units))
            elif not self._is_one_video(outcome, units):
                self.alone.add(outcome["video_id"])
                del self.landed[write_id], self.shared[write_id]
            elif len(units) == outcome["num_units"]:
                settled.append(self._settle(write_id, outcome, units))
        return settled

    def _is_one_video(self, outcome: OutcomeRow, units: Mapping[int, OutcomeRow]) -> bool:
        """Whether the decoders of a shared video found the same one, and showed it in the same way, so far."""
        write_id, others = outcome["write_id"], [next(iter(units.values()))]
        if outcome["rest_ms"] is not None:
            self.shared[write_id] = outcome["rest_ms"] / (outcome["num_units"] - outcome["unit"] - 1)
            others = list(units.values())
        return write_id not in self.shared or all(_facts_of(other) == _facts_of(outcome) for other in others)

    def parts(self) -> pa.Table:
        """Plan what shared videos lack: tables.PLAN, a row for each part, of the same write and the same attempt."""
        rows = [
            {**self.planned[write_id], "first_unit": part.start, "end_unit": part.stop}
            for write_id, unit_ms in self.shared.items()
            for part in _parts(self.landed[write_id], unit_ms)
        ]
        return pa.Table.from_pylist(rows, schema=tables.PLAN)

    def _settle(self, write_id: str, outcome: OutcomeRow, units: dict[int, OutcomeRow]) -> dict[str, Any]:
        failed = outcome["error_code"] is not None
        row = self._close(write_id, "failed" if failed else "indexed", outcome["error_code"], outcome["error"])
        facts: Mapping[str, Any] = outcome
        row |= {name: facts[name] for name in _FACTS}
        row["decode_ms"] = sum(unit["decode_ms"] or 0.0 for unit in units.values())
        shifts = [unit["keyframe_shift_s"] for unit in units.values() if unit["keyframe_shift_s"] is not None]
        row |= {"keyframe_shift_s": max(shifts, default=None), "time_rule": TIME_RULE}
        row["encode_ms"] = sum(unit["encode_ms"] or 0.0 for unit in units.values())
        return row

    def _close(self, write_id: str, status: str, error_code: str | None, error: str | None) -> dict[str, Any]:
        self.landed.pop(write_id, None)
        self.shared.pop(write_id, None)
        self.settled[error_code or status] += 1
        return self.planned.pop(write_id) | {
            "recipe": self.recipe,
            "run_id": self.run_id,
            "status": status,
            "error_code": error_code,
            "error": error,
            "indexed_at": clock.utc_now(),
        }

    def reopen(self, row: dict[str, Any]) -> None:
        """Take back a VIDEOS row that could not be committed: its video is planned and not settled."""
        self.settled[row["error_code"] or row["status"]] -= 1
        planned: Any = {name: row[name] for name in tables.PLAN.names}
        self.planned[row["write_id"]] = planned

    def unaccounted(self) -> list[PlanRow]:
        """Forget what is planned and not settled, and return it as work to plan again."""
        lost = list(self.planned.values())
        self.alone |= {self.planned[write_id]["video_id"] for write_id in self.shared}
        self.planned.clear()
        self.landed.clear()
        self.shared.clear()
        return lost

    def lost(self, work: list[PlanRow], passes: int) -> list[dict[str, Any]]:
        """The failed VIDEOS rows of videos that vanished in every pass."""
        self.planned |= {video["write_id"]: video for video in work}
        message = (
            f"its outcome was lost {passes} times with the workers that held it; see the cluster's logs, then retry."
        )
        return [self._close(video["write_id"], "failed", ErrorCode.LOST, message) for video in work]


def _facts_of(outcome: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(outcome[name] for name in (*_FACTS, "num_units"))


def _parts(landed: Mapping[int, OutcomeRow], unit_ms: float) -> Iterator[range]:
    """The units that a shared video lacks, in ranges that take about as long to decode."""
    num_units = next(iter(landed.values()))["num_units"]
    missing = [unit for unit in range(num_units) if unit not in landed]
    most = math.ceil(len(missing) / num_parts(len(missing) * unit_ms / 1e3))
    first = 0
    for place in range(1, len(missing) + 1):
        is_end = place == len(missing) or missing[place] != missing[place - 1] + 1
        if is_end or place - first == most:
            yield range(missing[first], missing[place - 1] + 1)
            first = place


@dataclass
class Counts:
    """Where every listed video went; `check` proves that none is missing."""

    listed: int = 0
    indexed: int = 0
    unchanged: int = 0
    moved: int = 0  # under a new name; it took its tokens along
    failed: int = 0
    known_failed: int = 0
    stale: int = 0  # indexed under another recipe only, or mistimed
    mistimed: int = 0  # of the stale ones: their frames were taken by even spread, which their time stamps do not have
    forgotten: int = 0
    not_attempted: int = 0
    deleted: int = 0  # not listed any more: rows written by this run
    gone: int = 0  # not listed any more and left as they are
    failures: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)  # files of the source that are not listed, by kind
    video_seconds: float = 0.0
    read_bytes: int = 0  # from the network
    read_whole: Counter[str] = field(default_factory=Counter)  # large videos of which a part would not do, by why
    on_cpu: Counter[str] = field(default_factory=Counter)  # videos that a GPU was to decode and did not, by why

    def add_told(self, outcomes: pa.Table) -> None:
        """Count what tables.OUTCOMES tell of the network, and of GPUs that decode."""
        self.read_bytes += pc.sum(outcomes["read_bytes"]).as_py() or 0
        self.read_whole.update(outcomes["whole_because"].drop_null().to_pylist())
        self.on_cpu.update(outcomes["cpu_because"].drop_null().to_pylist())

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count settled VIDEOS rows."""
        for row in rows:
            self.not_attempted -= 1
            if row["status"] == "indexed":
                self.indexed += 1
                self.video_seconds += row["duration_s"]
            else:
                self.failed += 1
                self.failures[row["error_code"]] += 1

    def as_json(self) -> dict[str, Any]:
        """The counts by name, failures by code, and what is left out by kind."""
        told: dict[str, Any] = {"failures": dict(self.failures), "left_out": dict(self.left_out.most_common())}
        told |= {name: dict(getattr(self, name).most_common()) for name in ("read_whole", "on_cpu")}
        return {**vars(self), **told, "video_seconds": round(self.video_seconds, 3)}

    @property
    def mostly_failed(self) -> str | None:
        """That more than half of the videos failed by themselves, in a sentence; None if they did not."""
        own = Counter({code: number for code, number in self.failures.items() if code in OWN_FAILURES})
        num_tried = self.indexed + self.failed
        if 2 * own.total() <= num_tried:
            return None
        codes = ", ".join(f"{code} {number}" for code, number in own.most_common())
        return (
            f"more than half of the videos failed by themselves: {own.total()} of {num_tried} ({codes}); "
            "`longvlm sql` on the view failures says why"
        )

    def check(self) -> None:
        """Raise RuntimeError unless every listed video went exactly one way."""
        done = self.indexed + self.failed + self.unchanged + self.moved
        left = self.known_failed + self.stale + self.forgotten + self.not_attempted
        if done + left != self.listed or self.not_attempted < 0:
            raise RuntimeError(f"the counts do not add up: {self}")


class Finished(NamedTuple):
    """Some outcomes, and the VIDEOS rows that they settled."""

    outcomes: pa.Table | None  # tables.OUTCOMES; None where rows are settled without
    rows: list[dict[str, Any]]


def commit_to(store: Store, parts: list[Finished], listed: Listed) -> list[dict[str, Any]]:
    """Commit closed shards of tokens and segments, then the rows that make them exist.

    Args:
        store: where they go.
        parts: of the run.
        listed: what the run was planned by.

    Returns:
        The rows that the store left out, and that are no longer among the parts: see `Store.commit`.
    """
    rows = [row for part in parts for row in part.rows]
    videos = pa.Table.from_pylist(rows, schema=tables.VIDEOS)
    write_ids = store.commit(_outcomes(parts), videos, look=listed, since=listed.planned_seq)
    if not write_ids:
        return []
    for part in parts:
        part.rows[:] = [row for row in part.rows if row["write_id"] not in write_ids]
    return [row for row in rows if row["write_id"] in write_ids]


def count_committed(parts: list[Finished], counts: Counts) -> None:
    """Count what is part of the store from now on."""
    outcomes = _outcomes(parts)
    metrics.count_written(outcomes)
    counts.add_told(outcomes)
    for part in parts:
        counts.add(part.rows)
        metrics.count_settled(part.rows)
        logs.failures(part.rows)


def _outcomes(parts: list[Finished]) -> pa.Table:
    return pa.concat_tables(
        [tables.OUTCOMES.empty_table(), *(part.outcomes for part in parts if part.outcomes is not None)]
    )
