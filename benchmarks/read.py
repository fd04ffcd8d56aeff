"""Reading stored tokens for the engine: bytes a CPU second, and bytes read for bytes wanted.

    python -m benchmarks.read [--rounds 9]

Shards as a writer closes them, a hundred videos each, 1024 wide in float16 with five global layers. The way is the
engine's: `read_tokens` for eight videos at a time, `from_arrow`, and the one copy into a prefix. Cases run in
turn; files are in the page cache. Bytes are the ranges asked for through fsspec, as an object store is asked, footers
included, one video or eight of a shard whose footer was not read before. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from fsspec.implementations.local import LocalFileSystem

from benchmarks.measure import interleave
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import by_video, read_tokens
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas import tables
from longvlm.schemas.identity import new_write_id

DIM, LAYERS, VIDEOS_PER_READ = 1024, 5, 8
CASES = {  # videos, segments, tokens a segment
    "paper": (100, 10, 30),
    "long 60 s": (60, 6, 80),
    "long 10 s": (100, 1, 80),
    "long 2 h": (1, 720, 80),
}


class Counted(LocalFileSystem):
    """Local files that count what is read of them."""

    protocol = "counted"
    num_bytes = 0

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        read = file.read

        def counted(*args: Any) -> bytes:
            found: bytes = read(*args)
            Counted.num_bytes += len(found)
            return found

        file.read = counted
        return file


def make_rows(num_videos: int, num_segments: int, num_tokens: int) -> pa.Table:
    """Rows of `tokens` of some videos, ordered as a writer orders them."""
    random = np.random.default_rng(0)
    blobs = [random.normal(size=(num_tokens, DIM)).astype("<f2").tobytes() for _ in range(8)]
    rows = [
        {
            "video_id": write_id[-16:],
            "recipe": "0123456789abcdef",
            "write_id": write_id,
            "segment": segment,
            "num_tokens": num_tokens,
            "dim": DIM,
            "dtype": "float16",
            "local": blobs[segment % len(blobs)],
            "sizes": np.full(num_tokens, 2560 // num_tokens, "<u2").tobytes(),
            "spans": np.tile(np.array([segment, segment + 9], "<u4"), (num_tokens, 1)).tobytes(),
            "cls": blobs[segment % len(blobs)][: LAYERS * DIM * 2],
            "num_frames": 10,
        }
        for write_id in sorted(new_write_id() for _ in range(num_videos))
        for segment in range(num_segments)
    ]
    return pa.Table.from_pylist(rows, tables.TOKENS)


def pin(folder: str, shard: dict[str, Any], scheme: str = "") -> Snapshot:
    """A snapshot of one shard."""
    stats = json.loads(shard["stats"])
    span = (stats["minValues"]["write_id"], stats["maxValues"]["write_id"])
    file = DataFile(f"{scheme}{folder}/tokens/{shard['path']}", shard["size_bytes"], stats["numRecords"], *span)
    return Snapshot({"tokens": PinnedTable(0, (file,))})


def read(snapshot: Snapshot, write_ids: list[str]) -> None:
    """Some videos as the engine reads them."""
    for start in range(0, len(write_ids), VIDEOS_PER_READ):
        for rows in by_video(read_tokens(snapshot, write_ids[start : start + VIDEOS_PER_READ])).values():
            from_arrow(rows).prefix()


def bytes_ratio(folder: str, rows: pa.Table, num_wanted: int) -> float:
    """Bytes asked for by bytes of blobs wanted, of some videos of a shard that nobody has read yet."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    write_ids = rows["write_id"].unique().to_pylist()
    wanted = write_ids[:: max(len(write_ids) // num_wanted, 1)][:num_wanted]
    shard = write_parquet(folder, "tokens", rows)
    Counted.num_bytes = 0
    found = read_tokens(pin(folder, shard, "counted://"), wanted)
    return Counted.num_bytes / found.select(["local", "sizes", "spans", "cls"]).nbytes


def cpu_seconds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    return {name: median(times) for name, times in interleave(functions, rounds, time.process_time).items()}


def main() -> None:
    """Write the shards, read them in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        Store.create(folder)
        made = {name: make_rows(*case) for name, case in CASES.items()}
        shards = {name: write_parquet(folder, "tokens", rows) for name, rows in made.items()}
        readers = {
            name: partial(read, pin(folder, shards[name]), rows["write_id"].unique().to_pylist())
            for name, rows in made.items()
        }
        writers = {name: partial(write_parquet, folder, "tokens", rows) for name, rows in made.items()}
        read_s, write_s = cpu_seconds(readers, rounds), cpu_seconds(writers, 2)
        result = {}
        print(f"{'':10} {'MB':>6}  read MB/CPU s  write MB/CPU s  bytes of 1 video  of 8")
        for name, rows in made.items():
            num_mb = shards[name]["size_bytes"] / 1e6
            speeds = num_mb / read_s[name], num_mb / write_s[name]
            ratios = bytes_ratio(folder, rows, 1), bytes_ratio(folder, rows, 8)
            columns = f"{speeds[0]:13.0f}  {speeds[1]:14.0f}  {ratios[0]:15.2f}x  {ratios[1]:.2f}x"
            print(f"{name:10} {num_mb:6.1f}  {columns}")
            keys = ("read_mb_per_cpu_s", "write_mb_per_cpu_s", "bytes_ratio_1", "bytes_ratio_8")
            result[name] = dict(zip(keys, (round(value, 3) for value in (*speeds, *ratios)), strict=True))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
