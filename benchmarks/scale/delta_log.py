"""Costs of a store's Delta log: commits, opening it after many, and the requests that they are on S3."""

import logging
import os
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa

from benchmarks.scale.world import KEYS_A_PAGE, encoded, files_below
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas import tables
from longvlm.schemas.identity import new_write_id, video_id

COMMITS, VIDEOS_A_COMMIT = 600, 200
SIDE = 100  # commits of each end that are compared: a commit takes longer, the longer ago the last checkpoint was
TINY_COMMITS = 10_000
OBJECTS, S3_COMMITS = 20_000, 120  # more than 100 commits: then the log has its first checkpoint
RECIPE = "made-up"


def planned(number: int, of: int) -> pa.Table:
    """tables.PLAN of some videos."""
    rows = [
        {"video_id": video_id(f"/v/{number}/{i}"), "uri": f"/v/{number}/{i}", "source": "/v", "etag": f"{number}-{i}",
         "size_bytes": 1, "write_id": new_write_id(), "attempts": 1}
        for i in range(of)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, tables.PLAN)


def ledger_rows(plan: pa.Table) -> pa.Table:
    """tables.VIDEOS of planned videos that came out well."""
    rows = [row | {"recipe": RECIPE, "status": "indexed", "num_segments": 1} for row in plan.to_pylist()]
    return pa.Table.from_pylist(rows, tables.VIDEOS)


def commits(folder: Path) -> dict[str, Any]:
    """600 commits of 200 videos each: shards written, then tokens, segments and videos committed."""
    store = Store.create(str(folder / "store"))
    write_s, commit_s, commit_cpu_s = [], [], []
    for number in range(COMMITS):
        plan = planned(number, VIDEOS_A_COMMIT)
        units, rows = encoded(plan), ledger_rows(plan)
        started = time.perf_counter()
        outcomes = write_shards(store.uri, units, RECIPE)
        written, burnt_s = time.perf_counter(), time.process_time()
        store.commit(outcomes, rows)
        commit_cpu_s.append(time.process_time() - burnt_s)
        write_s.append(written - started)
        commit_s.append(time.perf_counter() - written)
    both_s = [write + commit for write, commit in zip(write_s, commit_s, strict=True)]
    parts = {"write_shards": write_s, "commit": commit_s, "commit_cpu": commit_cpu_s, "both": both_s}
    sides = {"first": slice(0, SIDE), "last": slice(-SIDE, None)}
    told = {f"{part}_{side}_s": round(median(s[at]), 4) for part, s in parts.items() for side, at in sides.items()}
    return {"commits": COMMITS, "videos_each": VIDEOS_A_COMMIT, **told, "slowest_s": round(max(both_s), 3)}


def snapshot(folder: Path) -> dict[str, Any]:
    """10,000 commits of one video, then: open and pin, look at the videos, merge the files, open and pin again."""
    store = Store.create(str(folder / "store"))
    plan = planned(0, TINY_COMMITS)
    rows = ledger_rows(plan)
    append_s = []
    for number in range(TINY_COMMITS):
        started = time.perf_counter()
        store.append("videos", rows.slice(number, 1))
        append_s.append(time.perf_counter() - started)
    found = {
        "commits": TINY_COMMITS,
        "append_first_s": round(median(append_s[:SIDE]), 4),
        "append_last_s": round(median(append_s[-SIDE:]), 4),
        "open_and_pin_s": _opening_s(store.uri),
        **files_below(folder / "store"),
    }
    pinned = Store.open(store.uri).pin()
    started = time.perf_counter()
    with catalog.connect(pinned) as con:
        con.execute("SELECT count(*) FROM live_videos").fetchall()
    found["view_of_all_files_s"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    merge_small_files(store)
    found["merge_s"] = round(time.perf_counter() - started, 3)
    return {**found, "open_and_pin_after_merge_s": _opening_s(store.uri)}


def _opening_s(uri: str) -> float:
    """The median of five, each with a handle of its own."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        Store.open(uri).pin()
        seconds.append(time.perf_counter() - started)
    return round(median(seconds), 4)


class _Requests(logging.Handler):
    """Counts what a server logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """A line of werkzeug: `127.0.0.1 - - [...] "GET /bucket?... HTTP/1.1" 200 -`, with colours."""
        if found := re.search(r"\b(GET|PUT|POST|HEAD|DELETE) /", record.getMessage()):
            self.seen[found[1]] += 1

    def since(self, before: Counter[str]) -> dict[str, int]:
        """By method, since a copy of `seen` was taken."""
        return dict(self.seen - before)


def requests(_: Path) -> dict[str, Any]:
    """Listing 20,000 objects, a first and a late commit, opening, viewing, merging: requests, not times."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    counter = _Requests()
    log = logging.getLogger("werkzeug")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [counter], False
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    os.environ |= dict.fromkeys(names, "made-up") | {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port())}
    try:
        return _count_requests(counter)
    finally:
        server.stop()


def _count_requests(counter: _Requests) -> dict[str, Any]:
    from moto.s3.models import s3_backends

    from longvlm.pipeline.source.corpus import Source, list_pages

    backend: Any = s3_backends["123456789012"]["aws"]  # of the account that the server takes everybody for
    backend.create_bucket("bucket", "us-east-1")
    for i in range(OBJECTS):
        backend.put_object("bucket", f"v/{i % 7}/{i:06}.mp4", b"x")
    found: dict[str, Any] = {"objects": OBJECTS, "keys_a_page": KEYS_A_PAGE, "commits": S3_COMMITS}

    def count(name: str, act: Any) -> Any:
        before = counter.seen.copy()
        done = act()
        found[name] = counter.since(before)
        return done

    count("list", lambda: sum(len(page) for page in list_pages(Source("s3://bucket/v"))))
    store = count("create", lambda: Store.create("s3://bucket/index"))
    for number in range(S3_COMMITS):
        plan = planned(number, 1)
        outcomes = write_shards(store.uri, encoded(plan), RECIPE)
        act = partial(store.commit, outcomes, ledger_rows(plan))
        named = {1: "second_commit", S3_COMMITS - 2: "late_commit"}.get(number)
        count(named, act) if named else act()
    pinned = count("open_and_pin", lambda: Store.open(store.uri).pin())
    count("view", lambda: catalog.connect(pinned).execute("SELECT count(*) FROM live_videos").fetchall())
    count("merge", lambda: merge_small_files(store))
    pinned = Store.open(store.uri).pin()
    count("view_after_merge", lambda: catalog.connect(pinned).execute("SELECT count(*) FROM live_videos").fetchall())
    return found
