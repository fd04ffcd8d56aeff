"""Pages over a store of a million made-up videos: seconds of each, cold and warm, and the memory of the server.

    python -m benchmarks.scale.pages [--videos 1000000] [--rounds 9]

The store's tables are written as a run would leave them after merging: a row a video in the ledger (one in a hundred
failed), a segment each, a yes or no to one question. Then `longvlm serve` is started over it and asked as a browser
would: each page once cold, then several times. `after_a_commit` is the first page after the log moved: the server then
computes anew what its pages stand on. The last line is one JSON object; seconds are medians.
"""

import argparse
import http.client
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import pyarrow as pa

from longvlm.jobs.cluster.resources import SERVE
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.schemas import recipe, tables
from longvlm.schemas.identity import new_write_id, video_id
from longvlm.schemas.tower import TowerSpec

RECIPE = recipe.long(TowerSpec("made-up", "made-up", 24, (16, 16), 1024, 224, has_cls=True, search_dim=None))
ROWS_A_COMMIT, FAILED_EVERY = 100_000, 100
MADE_AT = datetime(2026, 11, 1)  # noqa: DTZ001 - naive UTC, as stores have it
QUESTION = {"question_id": "walks", "question": "Does anybody walk by?", "question_hash": "walks", "type": "bool"}
PAGES = {
    "first_page": "/",
    "words": "/?" + urlencode({"q": "camera-007 99"}),
    "failed": "/?status=failed",
    "predicate": "/?" + urlencode({"where": "duration_s > 109 AND uri LIKE '%camera-00%'"}),
    "question": "/questions?question=walks",
    "runs": "/runs",
}


def make_store(folder: Path, num_videos: int) -> Store:
    """A store of so many videos: ledger, segments and answers."""
    store = Store.create(str(folder / "store"))
    store.register_recipe(RECIPE, "made-up")
    for start in range(0, num_videos, ROWS_A_COMMIT):
        videos = made_up(start, min(ROWS_A_COMMIT, num_videos - start))
        store.append("videos", videos)
        live = videos.filter(pa.compute.equal(videos["status"], "indexed"))
        shared = {name: live[name] for name in ("video_id", "recipe", "write_id")}
        span = {"segment": 0, "start_s": 0.0, "end_s": 10.0, "first_frame": 0, "last_frame": 99, "num_frames": 10}
        store.append("segments", _table(tables.SEGMENTS, len(live), span, shared))
        said = {"value": live["value"], "confidence": live["confidence"], "answer": live["value"]}
        given = {"status": "answered", "model": "made-up", "answer_recipe": "a", "run_id": "r", "created_at": MADE_AT}
        given |= {**QUESTION, "num_visual_tokens": 80}
        store.append("answers", _table(tables.ANSWERS, len(live), given, {**shared, **said, "uri": live["uri"]}))
    merge_small_files(store)
    return store


def made_up(start: int, number: int) -> pa.Table:
    """Rows of tables.VIDEOS with the answer of each, as `value` and `confidence`."""
    numbers = range(start, start + number)
    uris = [f"s3://bucket/footage/camera-{n % 997:03}/{n:08}.mp4" for n in numbers]
    fails = [n % FAILED_EVERY == 0 for n in numbers]
    indexed = {
        "source": "s3://bucket/footage", "recipe": RECIPE.fingerprint, "attempts": 1, "run_id": "r", "fps": 10.0,
        "width": 640, "height": 360, "num_frames": 100, "codec": "h264", "decoder": "made-up", "num_segments": 1,
        "modified_at": MADE_AT, "indexed_at": MADE_AT,
    }  # fmt: skip
    columns = {
        "uri": uris,
        "video_id": [video_id(uri) for uri in uris],
        "write_id": [new_write_id() for _ in numbers],
        "etag": [f"{n:032x}" for n in numbers],
        "size_bytes": [1_000_000 + n % 9973 for n in numbers],
        "duration_s": [10.0 + n % 101 for n in numbers],
        "status": ["failed" if fail else "indexed" for fail in fails],
        "error_code": ["truncated" if fail else None for fail in fails],
        "error": ["The file ends early." if fail else None for fail in fails],
    }
    rows = _table(tables.VIDEOS, number, indexed, columns)
    rows = rows.append_column("value", pa.array(["true" if n % 3 else "false" for n in numbers]))
    return rows.append_column("confidence", pa.array([0.5 + n % 1000 / 2000 for n in numbers]))


def _table(schema: pa.Schema, number: int, constants: dict[str, Any], columns: dict[str, Any]) -> pa.Table:
    """Rows of a schema: columns as lists or as Arrow has them, constants, and null for what is in neither."""

    def column(field: pa.Field) -> Any:
        found = columns.get(field.name)
        if found is None:
            return pa.repeat(pa.scalar(constants.get(field.name), field.type), number)
        return pa.array(found, field.type) if isinstance(found, list) else found

    return pa.table([column(field) for field in schema], schema=schema)


class MeasuredServer:
    """`longvlm serve` over a store, asked for pages by the second."""

    def __init__(self, store_uri: str) -> None:
        command = [sys.executable, "-m", "longvlm", "serve", "--quiet", "--port", "0", "--store", store_uri]
        started = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
        assert self.process.stdout is not None
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/", self.process.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        self.port, self.start_s = int(found[1]), time.perf_counter() - started

    def seconds(self, target: str) -> float:
        """How long a page takes, to its last byte."""
        started = time.perf_counter()
        self.page(target)
        return time.perf_counter() - started

    def page(self, target: str) -> str:
        """What a page says. Raises RuntimeError where it is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", target)
        answer = connection.getresponse()
        data = answer.read().decode()
        connection.close()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{target} was answered with {answer.status}: {data[-2000:]}")
        return data

    def memory_mb(self, which: str) -> int:
        """VmRSS, what it holds now, or VmHWM, the most that it ever held."""
        return int(Path(f"/proc/{self.process.pid}/status").read_text().split(f"{which}:")[1].split()[0]) // 1000

    def end(self) -> None:
        """As Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def measure(store: Store, rounds: int) -> dict[str, Any]:
    """Every page, cold and warm."""
    server = MeasuredServer(store.uri)
    try:
        found: dict[str, Any] = {"start_s": round(server.start_s, 2), "start_mb": server.memory_mb("VmRSS")}
        first = server.page("/")
        following = re.search(r'href="(/\?[^"]*after=[^"]*)"', first)
        video = re.search(r'href="(/video/[^"]+)"', first)
        targets = {**PAGES, "next_page": following and following[1], "video": video and video[1]}
        for name, target in targets.items():
            if target is None:  # of a store that has no second page
                continue
            cold = server.seconds(target.replace("&amp;", "&"))
            warm = [server.seconds(target.replace("&amp;", "&")) for _ in range(rounds)]
            found[name] = {"cold_s": round(cold, 3), "warm_s": round(median(warm), 3), "slowest_s": round(max(warm), 3)}
        store.append("videos", made_up(10**9, 1).select(tables.VIDEOS.names))
        time.sleep(SERVE.renew_s + 0.1)
        found["after_a_commit_s"] = round(server.seconds("/"), 3)
        found |= {"mb": server.memory_mb("VmRSS"), "peak_mb": server.memory_mb("VmHWM")}
    finally:
        server.end()
    return found


def main() -> None:
    """Make the store, and look at it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pages-") as folder:
        started = time.perf_counter()
        store = make_store(Path(folder), options.videos)
        made_s = time.perf_counter() - started
        print(f"made a store of {options.videos:,} videos in {made_s:.0f} s", flush=True)
        found = {"videos": options.videos, "made_s": round(made_s, 1), **measure(store, options.rounds)}
    for name, value in found.items():
        print(f"  {name:20} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
