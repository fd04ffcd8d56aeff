"""Status and search of a store, without Ray: what it holds, and which segments look like a text."""

import json
from typing import Any

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.search import SearchResult, search
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.schemas.errors import InputError


def describe_store(store_uri: str) -> dict[str, Any]:
    """Describe a store: videos by status, segments, token_bytes, recipes, last_run (the newest row of `runs`)."""
    store = Store.open(store_uri)
    snapshot = store.pin()
    with catalog.connect(snapshot) as con:
        statuses = con.execute("SELECT status, count(*) FROM videos GROUP BY status ORDER BY status").fetchall()
        (num_segments,) = con.execute("SELECT count(*) FROM segments").fetchall()[0]
        last = con.execute("SELECT run_id, job, wall_s, counts FROM runs ORDER BY seq DESC LIMIT 1").fetchall()
    run = None
    if last:
        run_id, job, wall_s, counts = last[0]
        run = {"run_id": run_id, "job": job, "wall_s": wall_s, "counts": json.loads(counts)}
    return {
        "videos": dict(statuses),
        "segments": num_segments,
        "token_bytes": sum(file.size_bytes for file in snapshot.table("tokens").files),
        "recipes": list_recipes(store),
        "last_run": run,
    }


def list_runs(store_uri: str, limit: int) -> list[dict[str, Any]]:
    """List a store's runs, the newest first: finished_at (UTC), job, run_id, wall_s, stopped (why), counts."""
    sql = "SELECT finished_at, job, run_id, wall_s, counts FROM runs ORDER BY seq DESC LIMIT ?"
    with catalog.connect(Store.open(store_uri).pin(("runs",))) as con:
        rows = con.execute(sql, [limit]).fetchall()
    runs = []
    for finished_at, job, run_id, wall_s, text in rows:
        counts = json.loads(text)
        said = {"finished_at": f"{finished_at:%Y-%m-%d %H:%M:%S}", "job": job, "run_id": run_id, "wall_s": wall_s}
        parts = [counts, *(part for part in counts.values() if isinstance(part, dict))]  # a nightly has several
        stopped = "; ".join(part["stopped"] for part in parts if part.get("stopped")) or None
        runs.append({**said, "stopped": stopped, "counts": counts})
    return runs


def list_recipes(store: Store) -> list[dict[str, Any]]:
    """List the recipes that a store knows, oldest first."""
    return [
        {"name": entry.name, "recipe": entry.fingerprint, "active": entry.active, "model": entry.model}
        for entry in store.recipes()
    ]


def find_segments(store_uri: str, text: str, *, limit: int, where: str | None) -> SearchResult:
    """Search segments: those of a store whose search embeddings are nearest to a text.

    Raises:
        InputError: the store is empty, or its tower has no text encoder.
    """
    store = Store.open(store_uri)
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    query = load_text_encoder(active.recipe.tower.name).encode([text])[0]
    return search(store.pin(), query.numpy(), limit=limit, where=where)
