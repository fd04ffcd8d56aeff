"""The maintain job that stores float16 tokens again as int8: live videos of the active recipe, without watching them.

1 register  the same recipe with dtype int8, beside the active one
2 plan      what is live under the one and not under the other, some thousands at a time
3 copy      a wave: read, round, write a shard of tokens and one of segments
4 commit    the wave, as an index run would; what changed since it was planned is planned again
"""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.cluster.progress import shown_work
from longvlm.jobs.cluster.resources import MAX_PASSES
from longvlm.jobs.cluster.retry import persist
from longvlm.jobs.limits import INTERRUPTED
from longvlm.jobs.runs import close_run
from longvlm.pipeline.store.ledger import RegisteredRecipe, Store
from longvlm.pipeline.store.upkeep.copies import LeftOver, find_left_over, write_copies
from longvlm.pipeline.vision.requantise import as_int8
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import new_run_id
from longvlm.schemas.recipe import IndexRecipe

_PLANNED_VIDEOS = 4096  # at a time: each commit looks at what was committed since they were planned
_CHANGES = f"its row changed while it was copied, {MAX_PASSES} times; run again"
_WAVE_BYTES, _WAVE_VIDEOS = 256 << 20, 256  # of float16 tokens, about: what a crash may cost


@dataclass(frozen=True)
class RequantiseOrder:
    """The order to store a store's tokens again in another dtype."""

    store: str
    dtype: str
    show_progress: bool = False


@dataclass
class RequantiseReport:
    """The report of such a run."""

    run_id: str = field(default_factory=new_run_id)
    name: str = ""
    recipe: str = ""  # fingerprint
    videos: int = 0
    bytes_before: int = 0  # of their tokens, with all that is known of each
    bytes_after: int = 0
    outdated: int = 0  # left out: their files changed since
    problems: list[dict[str, str]] = field(default_factory=list)  # uri, write_id, problem: a row a video left out
    wall_s: float = 0.0
    interrupted: bool = False
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # it has none
    notes: list[str] = field(default_factory=list)

    @property
    def stopped(self) -> str | None:
        """Why not all is stored again; None if it is."""
        if self.interrupted:
            return INTERRUPTED
        if not self.problems:
            return None
        return (
            f"videos that could not be stored as int8: {len(self.problems):,}; `longvlm maintain --verify` says what "
            "is damaged, and after `--repair` the next index run watches them again"
        )

    def as_json(self) -> dict[str, Any]:
        """The counts of the run."""
        counted = {name: getattr(self, name) for name in ("name", "recipe", "videos", "bytes_before", "bytes_after")}
        left_out = {"outdated": self.outdated, "problems": len(self.problems)}
        return {
            **counted,
            **left_out,
            "wall_s": round(self.wall_s, 3),
            "stopped": self.stopped,
            "run_id": self.run_id,
        }


def run_requantise(order: RequantiseOrder) -> RequantiseReport:
    """Store the live tokens of a store's active recipe again as int8, under a recipe of their own, and note the run.

    What is there already is left as it is, so that the same order goes on where a run ended before. The active recipe
    stays the active one.

    Raises:
        InputError: there is no store or nothing in it, it is int8 already, or another dtype is asked for.
        OSError: the store is out of reach, or full; what was committed stays.
    """
    started_s = time.time()
    doing("reading the store")
    store = Store.open(order.store)
    active, recipe = _recipes(store, order.dtype)
    report = RequantiseReport(name=recipe.name, recipe=recipe.fingerprint)
    store.register_recipe(recipe, active.model)
    try:
        _requantise(store, active.fingerprint, report, show=order.show_progress)
    except KeyboardInterrupt:
        report.interrupted = True
    report.notes += _what_next(store, report)
    report.wall_s = time.time() - started_s
    close_run(store, "maintain", report)
    return report


def _recipes(store: Store, dtype: str) -> tuple[RegisteredRecipe, IndexRecipe]:
    """The active recipe, and the same with another dtype."""
    if dtype != "int8":
        raise InputError(
            f"tokens can be stored again as int8, and not as {dtype}: rounding cannot be undone; what was indexed in "
            "float16 is still there, and `longvlm recipe promote` shows it."
        )
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    if active.recipe.dtype == dtype:
        raise InputError(f"the recipe {active.name} of the store {store.uri} is int8 already; nothing is to be done.")
    return active, replace(active.recipe, name=f"{active.name}-int8", dtype="int8")


def _requantise(store: Store, old: str, report: RequantiseReport, *, show: bool) -> None:
    """Stages 2 to 4, until nothing is left but what cannot be copied."""
    tries: Counter[str] = Counter()
    while True:
        doing("looking for what is not int8 yet")
        given_up = [row["write_id"] for row in report.problems]
        left = find_left_over(store, old, report.recipe, given_up, _PLANNED_VIDEOS)
        report.outdated = left.num_outdated
        waves = _waves(left)
        if not waves:
            return
        for rows in shown_work(waves, f"storing {left.num_videos:,} videos as int8", len(waves), show=show):
            left_out, problems = _copy(store, left, rows, report)
            tries.update(left_out)
            problems |= {write: _CHANGES for write in left_out if tries[write] == MAX_PASSES}
            report.problems += [
                {"uri": row["uri"], "write_id": row["write_id"], "problem": problems[row["write_id"]]}
                for row in rows
                if row["write_id"] in problems
            ]


def _copy(
    store: Store, left: LeftOver, rows: list[dict[str, Any]], report: RequantiseReport
) -> tuple[set[str], dict[str, str]]:
    """Stages 3 and 4 of a wave: the writes that the store left out, and why some could not be copied."""
    copied = persist(store.uri, write_copies, store, left.snapshot, rows, report.recipe, report.run_id, as_int8)
    left_out = frozenset[str]()
    if copied.copied_from:
        left_out = persist(store.uri, store.commit, copied.outcomes, copied.videos, left.look)
    committed = copied.copied_from.keys() - left_out
    report.videos += len(committed)
    report.bytes_before += sum(copied.num_bytes[write][0] for write in committed)
    report.bytes_after += sum(copied.num_bytes[write][1] for write in committed)
    return {copied.copied_from[write] for write in left_out}, dict(copied.problems)


def _waves(left: LeftOver) -> list[list[dict[str, Any]]]:
    """The videos in waves of about so many bytes, by what a segment of the table takes."""
    files = left.snapshot.table("tokens").files
    segment_bytes = sum(file.size_bytes for file in files) / max(sum(file.num_rows for file in files), 1)
    waves: list[list[dict[str, Any]]] = []
    num_bytes = 0.0
    for row in left.rows:
        video_bytes = row["num_segments"] * segment_bytes
        if not waves or num_bytes + video_bytes > _WAVE_BYTES or len(waves[-1]) == _WAVE_VIDEOS:
            waves.append([])
            num_bytes = 0.0
        waves[-1].append(row)
        num_bytes += video_bytes
    return waves


def _what_next(store: Store, report: RequantiseReport) -> list[str]:
    notes = []
    if report.outdated:
        notes.append(
            f"videos whose files changed since they were indexed: {report.outdated:,}; the next index run watches them."
        )
    known = store.recipes()
    stored = next(one for one in known if one.fingerprint == report.recipe)
    if not stored.active and not report.interrupted:
        name = stored.name if [one.name for one in known].count(stored.name) == 1 else stored.fingerprint
        notes.append(f"the views still show float16; `longvlm recipe promote --store {store.uri} {name}` shows int8.")
    return notes
