"""Status of a store, without Ray and torch: what it holds, and what runs made of it."""

import json
from typing import Any

import duckdb

from longvlm.jobs.cluster.activity import doing
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.health import damaged_files, without
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot


def describe_store(store_uri: str) -> dict[str, Any]:
    """Describe a store: videos by status, segments, token_bytes, recipes, last_run (of `runs`), damaged_files (why)."""
    doing(f"reading the store {store_uri}")
    store = Store.open(store_uri)
    snapshot = store.pin(("videos", "segments", "tokens", "recipes", "runs"))
    shown = {name: snapshot.table(name) for name in ("videos", "segments", "recipes", "runs")}
    damaged = damaged_files(snapshot)
    views = ("videos", "segments", "runs", "recipes")
    with catalog.connect(without(Snapshot(shown), damaged), views) as con:  # of tokens the files' sizes are enough
        statuses = con.execute("SELECT status, count(*) FROM videos GROUP BY status ORDER BY status").fetchall()
        (num_segments,) = con.execute("SELECT count(*) FROM segments").fetchall()[0]
        runs, recipes = _runs(con, 1), _recipes(con)
    return {
        "videos": dict(statuses),
        "segments": num_segments,
        "token_bytes": sum(file.size_bytes for file in snapshot.table("tokens").files),
        "recipes": recipes,
        "last_run": runs[0] if runs else None,
        "damaged_files": damaged,
    }


def list_runs(store_uri: str, limit: int) -> list[dict[str, Any]]:
    """List a store's runs, the newest first: finished_at (UTC), job, run_id, wall_s, stopped (why), counts."""
    doing(f"reading the store {store_uri}")
    snapshot = Store.open(store_uri).pin(("runs",))
    with catalog.connect(without(snapshot, damaged_files(snapshot)), ("runs",)) as con:
        return _runs(con, limit)


def _runs(con: duckdb.DuckDBPyConnection, limit: int) -> list[dict[str, Any]]:
    sql = "SELECT finished_at, job, run_id, wall_s, counts FROM runs ORDER BY seq DESC LIMIT ?"
    runs = []
    for finished_at, job, run_id, wall_s, text in con.execute(sql, [limit]).fetchall():
        counts = json.loads(text)
        said = {"finished_at": f"{finished_at:%Y-%m-%d %H:%M:%S}", "job": job, "run_id": run_id, "wall_s": wall_s}
        parts = [counts, *(part for part in counts.values() if isinstance(part, dict))]  # a nightly has several
        stopped = "; ".join(part["stopped"] for part in parts if part.get("stopped")) or None
        runs.append({**said, "stopped": stopped, "counts": counts})
    return runs


def list_recipes(store: Store) -> list[dict[str, Any]]:
    """List the recipes that a store knows, oldest first."""
    with catalog.connect(store.pin(("recipes",)), ("recipes",)) as con:
        return _recipes(con)


def _recipes(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    rows = con.sql("SELECT name, recipe, active, model FROM recipes ORDER BY registered_seq, recipe").to_arrow_table()
    listed: list[dict[str, Any]] = rows.to_pylist()
    return listed
