"""Search by the second: how fast over a million moments, how well on the tiny world, and what verification adds.

    python -m benchmarks.search [--moments 1000000] [--rounds 9] [--videos 200] [--seed 5]

A million made-up moments, 768 wide, as an index of ten frames a segment holds them: the first search of a snapshot lays
their vectors out, the others find them in the page cache. What bounds these is the conversion of int8 to floats.

Tiny-world videos are indexed by the job with the shipped model, twice: in segments of two seconds as it was trained,
and of ten, as `long` makes them. For each object that is the only one with its name in its video, its name is searched
in that video alone (`--where`): a hit is right if it lies within one second of the object's event. Beside it stand
segments alone: the middle of the segment whose own vector is nearest, as it was searched before frames had vectors. For
verification each name is searched in all videos; of the first ten hits, by score and by the model's yes among the first
thirty, those are right at whose second the object is seen.

The last line is one JSON object.
"""

import json
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from longvlm import tinyworld
from longvlm.jobs.answer.loaded import LoadedModel
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.query.verify import verify
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.moments import drop_moments
from longvlm.pipeline.store.query.search import Hit, search
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.vision.text_encoder import TextEncoder, load_text_encoder
from longvlm.schemas import tables
from longvlm.schemas.identity import new_write_id
from longvlm.tinyworld.questions import with_article
from longvlm.tinyworld.scenes import SEGMENT_S, draw_scene
from longvlm.tinyworld.world import make_world, video_name

WIDTH, FRAMES, SEGMENTS_PER_VIDEO, SEGMENTS_PER_FILE = 768, 10, 360, 3600
NEAR_S = 1.0
FIRST, CANDIDATES, NUM_NAMES = 10, 30, 40
TEN_SECONDS = 'base = "tiny"\nname = "ten"\nsegment_s = 10.0\nframes_per_segment = 20\ntokens_per_segment = 40\n'


# --- a million moments ---


def made_up(folder: Path, num_moments: int) -> Snapshot:
    """A snapshot of that many moments of live videos."""
    random = np.random.default_rng(0)
    files: dict[str, list[DataFile]] = {"segments": [], "videos": [], "recipes": []}

    for table in files:
        (folder / table).mkdir()

    def write(table: str, rows: pa.Table) -> None:
        shard = write_parquet(str(folder), table, rows)
        files[table].append(DataFile(f"{folder}/{table}/{shard['path']}", shard["size_bytes"], rows.num_rows))

    recipe = {"recipe": "r", "name": "r", "spec": "{}", "model": "m", "event": "promoted", "seq": 1}
    write("recipes", pa.Table.from_pylist([recipe], tables.RECIPES))
    num_left = num_moments // FRAMES
    while num_left > 0:
        number = min(SEGMENTS_PER_FILE, num_left)
        writes = [new_write_id() for _ in range(-(-number // SEGMENTS_PER_VIDEO))]
        videos = [
            {"video_id": write, "uri": f"/{write}.mp4", "recipe": "r", "status": "indexed", "write_id": write, "seq": 1}
            for write in writes
        ]
        write("videos", pa.Table.from_pylist(videos, tables.VIDEOS))
        rows = [_segment(random, writes[i // SEGMENTS_PER_VIDEO], i % SEGMENTS_PER_VIDEO) for i in range(number)]
        write("segments", pa.Table.from_pylist(rows, tables.SEGMENTS))
        num_left -= number
    return Snapshot({name: PinnedTable(1, tuple(some)) for name, some in files.items()})


def _segment(random: np.random.Generator, write: str, number: int) -> dict[str, Any]:
    start_s = number * 10.0
    return {
        "video_id": write,
        "write_id": write,
        "recipe": "r",
        "segment": number,
        "start_s": start_s,
        "end_s": start_s + 10,
        "embedding": random.standard_normal(WIDTH, np.float32),
        "frames": list(range(number * 250, number * 250 + 250, 25)),
        "times_s": [start_s + i for i in range(FRAMES)],
        "frame_embeddings": random.integers(-127, 128, FRAMES * WIDTH, np.int8).tobytes(),
    }


def time_a_million(num_moments: int, rounds: int) -> dict[str, Any]:
    """Seconds and memory of the first search of a snapshot and of the later ones."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot = made_up(Path(folder), num_moments)
        queries = np.random.default_rng(1).standard_normal((rounds + 1, WIDTH), np.float32)
        before_mb = _peak_mb()
        started_s = time.perf_counter()
        found = search(snapshot, queries[0])
        first_s = time.perf_counter() - started_s
        warm = []
        for query in queries[1:]:
            started = time.perf_counter(), time.process_time()
            search(snapshot, query)
            warm.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        drop_moments(snapshot)
    return {
        "moments": found.num_scanned,
        "vector_mb": round(found.bytes_scanned / 1e6),
        "first_s": round(first_s, 2),
        "warm_s": round(median(wall for wall, _ in warm), 3),
        "warm_slowest_s": round(max(wall for wall, _ in warm), 3),
        "warm_cpu_s": round(median(cpu for _, cpu in warm), 3),
        "peak_mb_before": before_mb,
        "peak_mb": _peak_mb(),  # mapped pages of the file are among it
    }


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# --- the tiny world ---


def only_ones(seed: int, num_videos: int) -> Iterator[tuple[int, str, float, float]]:
    """Objects that are the only one with their name in their video: its number, the name, from when to when."""
    for number in range(num_videos):
        events = draw_scene(seed, number).events
        for event in events:
            if [other.name for other in events].count(event.name) == 1:
                yield number, event.name, event.start * SEGMENT_S, event.end * SEGMENT_S


def is_near(second: float, start_s: float, end_s: float) -> bool:
    """Whether a second lies within one of an event."""
    return start_s - NEAR_S <= second <= end_s + NEAR_S


def find_events(store: Store, texts: TextEncoder, seed: int, num_videos: int) -> dict[str, Any]:
    """Shares of first hits near the event, by moments and by segments alone."""
    snapshot = store.pin()
    with catalog.connect(snapshot, ("segments",)) as con:
        rows = con.execute("SELECT uri, start_s, end_s, embedding FROM segments").fetchall()
    by_video: dict[str, list[tuple[float, NDArray[np.float32]]]] = defaultdict(list)
    for uri, start_s, end_s, embedding in rows:
        by_video[Path(uri).stem].append(((start_s + end_s) / 2, np.array(embedding, np.float32)))
    right: dict[str, list[bool]] = defaultdict(list)
    for number, name, start_s, end_s in only_ones(seed, num_videos):
        query = texts.encode([with_article(name)])[0].numpy()
        video = video_name(seed, number)
        (hit,) = search(snapshot, query, 1, f"uri LIKE '%/{video}.mp4'").rows
        middle_s, _ = max(by_video[video], key=lambda one: float(one[1] @ query))
        right["moments"].append(is_near(hit.best_s, start_s, end_s))
        right["segments_alone"].append(is_near(middle_s, start_s, end_s))
    return {"events": len(right["moments"]), **{name: round(mean(some), 4) for name, some in right.items()}}


def verify_names(store: Store, texts: TextEncoder, seed: int, num_videos: int) -> dict[str, Any]:
    """Precision of the first ten hits by score and by the model's yes, and how many a second are verified."""
    snapshot, loaded = store.pin(), LoadedModel(store, None, "float32")
    count: dict[str, int] = defaultdict(int)
    for _, name, _, _ in only_ones(seed, num_videos):
        count[name] += 1
    names = [name for name, number in sorted(count.items()) if number >= FIRST]
    before, after, num_asked, seconds = [], [], 0, 0.0
    for name in islice(names, NUM_NAMES):
        query = texts.encode([with_article(name)])[0].numpy()
        hits = search(snapshot, query, CANDIDATES).rows
        started_s = time.perf_counter()
        told = verify(loaded, snapshot, hits, f"is there {with_article(name)}?")
        seconds += time.perf_counter() - started_s
        num_asked += len(hits)
        by_yes = sorted(range(len(hits)), key=lambda i: -(told.yes[i] or 0.0))
        right = [_is_seen(hit, name, seed) for hit in hits]
        before.append(mean(right[:FIRST]))
        after.append(mean(right[i] for i in by_yes[:FIRST]))
    return {
        "names": len(before),
        "first_ten_by_score": round(mean(before), 4),
        "first_ten_by_yes": round(mean(after), 4),
        "questions_per_s": round(num_asked / seconds, 1),  # the model's loading, once a search, is among it
    }


def _is_seen(hit: Hit, name: str, seed: int) -> bool:
    """Whether the object is in the picture at the hit's best second."""
    scene = draw_scene(seed, int(Path(hit.uri).stem.rpartition("-")[2]))
    assert Path(hit.uri).stem == video_name(seed, int(Path(hit.uri).stem.rpartition("-")[2]))
    return scene.event_at(min(int(hit.best_s / SEGMENT_S), scene.num_segments - 1)).name == name


@click.command()
@click.option("--moments", default=1_000_000)
@click.option("--rounds", default=9)
@click.option("--videos", default=200)
@click.option("--seed", default=5)
def main(moments: int, rounds: int, videos: int, seed: int) -> None:
    """Time, then count."""
    told: dict[str, Any] = {"million": time_a_million(moments, rounds) if moments else None}
    print(told, flush=True)
    texts = load_text_encoder(f"{tinyworld.MODEL}/tower")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_world(folder / "videos", seed, videos)
        (folder / "ten.toml").write_text(TEN_SECONDS)
        order = IndexOrder(Source(f"{folder}/videos"), "", model=tinyworld.MODEL, ray_address="none")
        for name, recipe in (("2 s", tinyworld.RECIPE), ("10 s", f"{folder}/ten.toml")):
            store = f"{folder}/{name.replace(' ', '')}"
            run_index(replace(order, store=store, recipe=recipe))
            told[name] = find_events(Store.open(store), texts, seed, videos)
            print(name, told[name], flush=True)
        told["verify"] = verify_names(Store.open(f"{folder}/2s"), texts, seed, videos)
        for left in ("2s", "10s"):
            drop_moments(Store.open(f"{folder}/{left}").pin())
    print(json.dumps({"benchmark": "search", "seed": seed, "videos": videos, **told}))


if __name__ == "__main__":
    main()
