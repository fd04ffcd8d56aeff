"""Planning an answer run over a large store, and finding the shards of its first wave in the log.

    python -m benchmarks.plan [--videos 1000000]

A store is made in a temporary folder: real Delta tables of a million live videos and a million answers. Of the tokens
there is only the log, with 10,000 AddActions: planning reads that and opens no shard, so there are none. Measured, each
in a fresh process and from `Store.open` on: ten questions a video out of a parquet file that names videos by uri (ten
million rows with texts of their own; reading the file is told apart), the same with `--limit 100`, and ten questions
about every video. Peak memory is the process's, with the question table in it. The last line is one JSON object, its
plan_s and peak_mb the largest of the three cases.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from longvlm.jobs.answer.plan import plan
from longvlm.jobs.cluster.resources import WAVE_QUESTIONS
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import recipe, tables
from longvlm.schemas.tower import TowerSpec

QUESTIONS_PER_VIDEO, SHARDS, APPENDS = 10, 10_000, 50
TOWER = TowerSpec("made-up", "feed", 4, (4, 4), 64, 32, has_cls=True, search_dim=16)
STORED = recipe.long(TOWER)
RECIPE = recipe.AnswerRecipe(model="made-up", weights="feed", index_recipe=STORED.fingerprint)
NAMES_SQL = """
CREATE MACRO write_id(n) AS printf('%08x-%04x-7%03x-8%03x-%012x', 27000000 + n // 60000, (n % 60000)::INTEGER,
    (n * 7919) % 4096, (n * 104729) % 4096, (n * 1299709) % 281474976710656);
CREATE MACRO uri(n) AS printf('s3://a-bucket/footage/camera-%03d/%08d.mp4', n % 997, n);
CREATE MACRO video_id(n) AS substr(sha256(uri(n)), 1, 32);
CREATE MACRO text(n, j) AS printf('Question %d about video %d: what happens?', j, n)
"""
VIDEOS_SQL = """
SELECT video_id(n) AS video_id, uri(n) AS uri, printf('x-%d', n) AS external_id, md5(n::VARCHAR) AS etag,
    1000000 AS size_bytes, $3 AS recipe, 'indexed' AS status, 120.0 AS duration_s, 12 AS num_segments,
    write_id(n) AS write_id
FROM range($1, $2) r(n)"""
ANSWERS_SQL = f"""
SELECT 'q' || j AS question_id, text(n, j) AS question, substr(sha256(question), 1, 16) AS question_hash,
    'text' AS "type", write_id(n) AS write_id, uri(n) AS uri, 'Somebody walks by.' AS answer, 'answered' AS status,
    $3 AS answer_recipe, now()::TIMESTAMP AS created_at, 'run' AS run_id
FROM range($1, $2, 10) r(n), range({QUESTIONS_PER_VIDEO}) s(j)"""  # a tenth of the videos has all its answers
QUESTIONS_SQL = f"""
SELECT 'q' || j AS question_id, text(n, j) AS question, uri(n) AS video
FROM range($1, $2) r(n), range({QUESTIONS_PER_VIDEO}) s(j)"""
SHARDS_SQL = "SELECT write_id(n), write_id(n + $3 - 1) FROM range($1, $2, $3) r(n) ORDER BY n"


def make_store(folder: Path, num_videos: int) -> None:
    """A store and two question files: every video by name, and all of them at once."""
    store = Store.create(str(folder / "store"))
    store.register_recipe(STORED, "made-up")
    with duckdb.connect() as con:
        con.execute(f"SET enable_progress_bar = false; {NAMES_SQL}")
        each = num_videos // APPENDS
        for table, sql, mark in (
            ("videos", VIDEOS_SQL, STORED.fingerprint),
            ("answers", ANSWERS_SQL, RECIPE.fingerprint),
        ):
            for start in range(0, num_videos, each):
                rows = con.sql(sql, params=[start, start + each, mark]).to_arrow_table()
                store.append(table, _filled(rows, tables.TABLES[table]))
        each = num_videos // SHARDS
        spans = con.execute(SHARDS_SQL, [0, num_videos, each]).fetchall()
        shards = [_shard(first, last, each) for first, last in spans]
        store.commit(pa.Table.from_pylist(shards, tables.OUTCOMES), tables.VIDEOS.empty_table())
        named = con.sql(QUESTIONS_SQL, params=[0, num_videos])
        named.write_parquet(str(folder / "named.parquet"))
    standing = [{"question_id": f"q{j}", "question": f"What happens, {j}?"} for j in range(QUESTIONS_PER_VIDEO)]
    (folder / "standing.jsonl").write_text("\n".join(map(json.dumps, standing)))


def _filled(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with nulls in the columns that a plan does not read."""
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows.select(schema.names).cast(schema)


def _shard(first: str, last: str, num_videos: int) -> dict[str, Any]:
    statistics = {"numRecords": 12 * num_videos, "minValues": {"write_id": first}, "maxValues": {"write_id": last}}
    return {"tokens_shard": {"path": f"{first}.parquet", "size_bytes": 200 << 20, "stats": json.dumps(statistics)}}


def measure(folder: Path, questions: str, limit: int | None) -> dict[str, float]:
    """Plan once, in this process: seconds, and the most memory this process ever held."""
    started = time.perf_counter()
    asked = read_questions(str(folder / questions))
    read_s = time.perf_counter() - started
    started = time.perf_counter()
    store = Store.open(str(folder / "store"))
    snapshot = store.pin()
    asking = plan(snapshot, asked, RECIPE, limit=limit)
    wave = next(asking.waves(WAVE_QUESTIONS), None)
    write_ids = set(wave["write_id"].to_pylist()) if wave else set()
    num_shards = len(snapshot.files_for("tokens", write_ids))
    plan_s = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()  # ru_maxrss starts from what the parent had when it forked
    return {
        "read_s": round(read_s, 2),
        "plan_s": round(plan_s, 2),
        "peak_mb": int(status.split("VmHWM:")[1].split()[0]) // 1000,
        "videos": asking.num_videos,
        "asked": asking.num_asked,
        "reused": sum(asking.reused.values()),
        "wave_videos": len(write_ids),
        "wave_shards": num_shards,
    }


def main() -> None:
    """Make the store, measure each case in a child, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000, help="a multiple of 500,000")
    num_videos = parser.parse_args().videos
    cases = {
        "by name": ("named.parquet", None),
        "limit 100": ("named.parquet", 100),
        "to all": ("standing.jsonl", None),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder), num_videos)
        for name, case in cases.items():
            with multiprocessing.get_context("spawn").Pool(1) as child:
                found[name] = child.apply(measure, (Path(folder), *case))
    print(f"{num_videos} videos, {SHARDS} shards in the log")
    print(f"  {'case':10}" + "".join(f"{column:>14}" for column in found["by name"]))
    for name, row in found.items():
        print(f"  {name:10}" + "".join(f"{value:14,}" for value in row.values()))
    worst = {key: max(row[key] for row in found.values()) for key in ("plan_s", "peak_mb", "read_s")}
    print(json.dumps({**worst, "videos": num_videos, "cases": found}))


if __name__ == "__main__":
    main()
