"""The stages of a store at a million videos: list, diff, plan, commit, compact, pin and view, on two cores.

    python -m benchmarks.scale [--videos 1000000]

Only watching is made up (benchmarks/scale/world.py): the bucket answers 1000 keys a page, a video has one segment of
two small tokens, and all else is the code of the index job in the driver's process, without Ray. Everything is done
with a tenth of the videos first, so that what grows can be told from what does not. Each stage runs in a process of its
own, whose memory at its peak is told. Then what the log costs: commits of 200 videos, opening a store after 10,000
commits, requests to an S3 server on the loopback (benchmarks/scale/delta_log.py). The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from benchmarks.scale import delta_log
from benchmarks.scale.world import SOURCE, MadeUpBucket, Stopwatch, files_below, peak_mb, serve, watch
from benchmarks.untrained_tower import build_untrained_tower
from longvlm.jobs.cluster.resources import WAVE_VIDEOS
from longvlm.jobs.index.accounting import Account, Counts
from longvlm.jobs.index.order import IndexOrder, IndexReport
from longvlm.jobs.index.run import IndexRun, _keep_books, run_index, take_stock
from longvlm.jobs.limits import Limits
from longvlm.jobs.runs import record_run
from longvlm.pipeline.source.corpus import spool_source
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.look import Listed
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas import tables

CORES = 2
LOG_STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "commits": delta_log.commits,
    "snapshot": delta_log.snapshot,
    "requests": delta_log.requests,
}
ANSWERS_SQL = """
SELECT 'q' || j AS question_id, 'Number ' || j || '?' AS question, md5(question) AS question_hash, 'text' AS "type",
    video_id, uri, write_id, 'Somebody walks by.' AS answer, 'answered' AS status, 'made-up' AS model,
    'recipe' AS answer_recipe, now()::TIMESTAMP AS created_at, 'run' AS run_id
FROM (FROM live_videos ORDER BY write_id LIMIT $1 OFFSET $2), range(2) r(j)"""
QUERIES = {
    "count_videos": "SELECT count(*) FROM videos",
    "select_videos": "SELECT count(*), sum(duration_s) FROM videos WHERE width >= 64 AND uri LIKE '%camera-00%'",
    "one_video": "SELECT * FROM videos WHERE uri LIKE '%00000007.mp4'",
    "count_segments": "SELECT count(*) FROM segments",
    "count_answers": "SELECT count(*) FROM answers WHERE answer ILIKE '%walks%'",
    "answers_wide": "SELECT count(*), count(q0), count(q1) FROM answers_wide",
    "failures": "SELECT error_code, count(*) FROM failures GROUP BY ALL",
}


def order_for(folder: Path, **settings: Any) -> IndexOrder:
    """The run of the made-up bucket into the folder's store."""
    return IndexOrder(SOURCE, str(folder / "store"), model=str(folder / "tower"), recipe="tiny", **settings)


def list_bucket(folder: Path, num_videos: int) -> dict[str, Any]:
    """Every page of the bucket to a file."""
    serve(num_videos)
    clock = Stopwatch()
    num_listed = spool_source(SOURCE, str(folder / "listing.parquet"))
    clock.lap("list")
    size = (folder / "listing.parquet").stat().st_size
    return {**clock.seconds, "listed": num_listed, "requests": MadeUpBucket.num_requests, "mb": round(size / 1e6, 1)}


def index(folder: Path, num_videos: int) -> dict[str, Any]:
    """The first run of all: as `index_source`, with `watch` in place of the stages on Ray."""
    serve(num_videos)
    clock = Stopwatch()
    order = order_for(folder)
    _, recipe, model, changes = take_stock(order, folder / "listing.parquet", Counter())
    clock.lap("list_and_diff")
    with changes:
        store, report = Store.create(order.store), IndexReport(Counts(), 0.0)
        store.register_recipe(recipe, model)
        _keep_books(changes, store, report, prune=False)
        stages = partial(watch, store.uri, recipe.fingerprint)
        listed = Listed(changes.criteria.listed_seq, changes.look.seq, report.run_id, lambda _: True)
        run = IndexRun(stages, recipe.fingerprint, store, listed, report, Limits(None, 0.2, 0.0))
        for wave in changes.waves(WAVE_VIDEOS):
            run.index_wave(wave)
    run.flush()
    report.counts.check()
    clock.lap("watch_and_commit")
    record_run(store, "index", report)
    return {**clock.seconds, "indexed": report.counts.indexed, **files_below(folder / "store")}


def answer(folder: Path, num_videos: int) -> dict[str, Any]:
    """Two answers a video, committed 20,000 videos at a time."""
    clock = Stopwatch()
    store = Store.open(str(folder / "store"))
    with catalog.connect(store.pin(("videos",))) as con:
        for start in range(0, num_videos, 20_000):
            rows = con.sql(ANSWERS_SQL, params=[20_000, start]).to_arrow_table()
            missing = [field for field in tables.ANSWERS if field.name not in rows.column_names]
            for field in missing:
                rows = rows.append_column(field, pa.nulls(len(rows), field.type))
            store.append("answers", rows)
    clock.lap("commit")
    return clock.seconds


def compact(folder: Path, _: int) -> dict[str, Any]:
    """Small files to large ones, as at the end of every job."""
    store = Store.open(str(folder / "store"))
    clock = Stopwatch()
    merged = merge_small_files(store)
    clock.lap("merge")
    return {**clock.seconds, "merged_away": merged, **files_below(folder / "store")}


def view(folder: Path, _: int) -> dict[str, Any]:
    """Pin, connect, and look through the views."""
    clock = Stopwatch()
    snapshot = Store.open(str(folder / "store")).pin()
    clock.lap("open_and_pin")
    with catalog.connect(snapshot) as con:
        clock.lap("connect")
        for name, sql in QUERIES.items():
            con.execute(sql).fetchall()
            clock.lap(name)
    return {**clock.seconds, "pinned_files": sum(len(table.files) for table in snapshot.tables.values())}


def nothing(folder: Path, num_videos: int) -> dict[str, Any]:
    """A night in which nothing changed: the whole of `longvlm index --prune`, runs row and tidying included."""
    serve(num_videos)
    before, runs = _log_versions(folder), _number(folder, "runs")
    clock = Stopwatch()
    report = run_index(order_for(folder, prune=True))
    clock.lap("run")
    after = _log_versions(folder)
    changed = {name: after[name] - version for name, version in before.items() if after[name] != version}
    if changed != {"runs": 1} or ray.is_initialized() or report.counts.unchanged != num_videos:
        raise RuntimeError(f"something was done in a night without changes: {changed}, {report}")
    return {**clock.seconds, "unchanged": report.counts.unchanged, "runs_rows": _number(folder, "runs") - runs}


def night(folder: Path, num_videos: int) -> dict[str, Any]:
    """A night with changes: listed, held against the ledger and planned up to the first wave; nothing is written."""
    serve(num_videos, night=1)
    clock = Stopwatch()
    spool_source(SOURCE, str(folder / "night.parquet"))
    clock.lap("list")
    _, _, _, changes = take_stock(order_for(folder, prune=True), folder / "night.parquet", Counter())
    clock.lap("list_and_diff")
    with changes:
        rows = changes.bookkeeping("run", prune=True)
        planned = Account("recipe", "run").plan(next(changes.waves(WAVE_VIDEOS)))
        clock.lap("plan")
        counts = {"work": changes.num_work, "gone": changes.num_gone, **changes.others}
    plan_s = clock.seconds["list_and_diff_s"] - clock.seconds["list_s"] + clock.seconds["plan_s"]
    told = {"diff_and_plan_s": round(plan_s, 3), "rows_without_watching": len(rows), "first_wave": len(planned)}
    return {**clock.seconds, **told, **counts}


JOURNEY: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "list": list_bucket,
    "index": index,
    "answer": answer,
    "compact": compact,
    "view": view,
    "no changes": nothing,
    "night": night,
}


def _log_versions(folder: Path) -> dict[str, int]:
    return {name: table.version for name, table in Store.open(str(folder / "store")).pin().tables.items()}


def _number(folder: Path, table: str) -> int:
    with catalog.connect(Store.open(str(folder / "store")).pin((table,))) as con:
        return int(con.execute(f"SELECT count(*) FROM ledger_{table}").fetchall()[0][0])


def in_process_of_its_own(stage: str, folder: Path, num_videos: int) -> dict[str, Any]:
    """Run one stage in a child and return what it says."""
    command = [sys.executable, "-m", "benchmarks.scale", "--stage", stage, "--folder", str(folder)]
    command += ["--videos", str(num_videos)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    if done.returncode:
        raise RuntimeError(f"the stage {stage} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {stage:10} {num_videos:>9,}  {_told(found)}", flush=True)
    return found


def _told(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in found.items()
    )


def run_stage(stage: str, folder: Path, num_videos: int) -> None:
    """What a child does."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    start_mb = peak_mb()  # libraries and nothing else
    found = JOURNEY[stage](folder, num_videos) if stage in JOURNEY else LOG_STAGES[stage](folder)
    print(json.dumps({**found, "start_mb": start_mb, "peak_mb": peak_mb()}))


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float]:
    """How many times as much of everything ten times the videos took; what grows with them is near 10."""
    numbers = {name: value for name, value in small.items() if isinstance(value, int | float) and value}
    return {name: round(large[name] / value, 2) for name, value in numbers.items()}


def main() -> None:
    """Run every stage with a tenth and with all of the videos, then those of the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--stage", choices=[*JOURNEY, *LOG_STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        run_stage(options.stage, options.folder, options.videos)
        return
    found: dict[str, Any] = {"videos": options.videos, "cores": CORES}
    runs = []
    for num_videos in (options.videos // 10, options.videos):
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            build_untrained_tower(Path(folder) / "tower")
            runs.append({stage: in_process_of_its_own(stage, Path(folder), num_videos) for stage in JOURNEY})
    for stage in JOURNEY:
        grew = growth(runs[0][stage], runs[1][stage])
        print(f"  {stage:10} ten times the videos took x times: {_told(grew)}")
        found[stage.replace(" ", "_")] = {**runs[1][stage], "growth": grew}
    for stage in LOG_STAGES:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            found[stage] = in_process_of_its_own(stage, Path(folder), 0)
    print(json.dumps(found))
