"""Reading stored tokens for the engine: bytes a CPU second, and bytes read for bytes wanted.

    python -m benchmarks.read [--rounds 9]

Shards as a writer closes them, a hundred videos each, 1024 wide with five global layers, in float16 and in int8. The
way is the engine's: `read_tokens` for eight videos at a time, `videos_from_arrow`, and the one copy into a prefix.
Cases run in turn; files are in the page cache. MB are those of the float16 shard, whichever is read, so that they stand
for tokens. Bytes are the ranges asked for through fsspec, as an object store is asked, footers included, one video or
eight of a shard whose footer was not read before. The last line is one JSON object.
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
import pyarrow as pa
import torch
from fsspec.implementations.local import LocalFileSystem

from benchmarks.measure import interleave
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.vision.tokens import SegmentTokens, VideoTokens, videos_from_arrow
from longvlm.schemas import tables
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.recipe import TokenDtype

DIM, LAYERS, VIDEOS_PER_READ = 1024, 5, 8
DTYPES: tuple[TokenDtype, ...] = ("float16", "int8")
BLOBS = ["local", "scales", "sizes", "spans", "cls"]
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


def make_rows(num_videos: int, num_segments: int, num_tokens: int, dtype: TokenDtype = "float16") -> pa.Table:
    """Rows of `tokens` of some videos, ordered as a writer orders them."""
    random = torch.Generator().manual_seed(0)
    blobs = [
        SegmentTokens(
            segment=0,
            num_frames=10,
            local=torch.randn(num_tokens, DIM, generator=random),
            sizes=torch.full((num_tokens,), 2560 // num_tokens),
            spans=torch.tensor([[0, 9]]).expand(num_tokens, 2),
            cls=torch.randn(LAYERS, DIM, generator=random),
        ).to_row(dtype)
        for _ in range(8)
    ]
    rows = [
        {
            **blobs[segment % len(blobs)],
            "video_id": write_id[-16:],
            "recipe": "0123456789abcdef",
            "write_id": write_id,
            "segment": segment,
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
        for video in videos_from_arrow(read_tokens(snapshot, write_ids[start : start + VIDEOS_PER_READ])).values():
            assert isinstance(video, VideoTokens)
            video.prefix()


def bytes_ratio(folder: str, rows: pa.Table, num_wanted: int) -> float:
    """Bytes asked for by bytes of blobs wanted, of some videos of a shard that nobody has read yet."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    write_ids = rows["write_id"].unique().to_pylist()
    wanted = write_ids[:: max(len(write_ids) // num_wanted, 1)][:num_wanted]
    shard = write_parquet(folder, "tokens", rows)
    Counted.num_bytes = 0
    found = read_tokens(pin(folder, shard, "counted://"), wanted)
    return Counted.num_bytes / found.select(BLOBS).nbytes


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
        made = {f"{name}, {dtype}": make_rows(*case, dtype) for name, case in CASES.items() for dtype in DTYPES}
        shards = {case: write_parquet(folder, "tokens", rows) for case, rows in made.items()}
        readers = {
            case: partial(read, pin(folder, shards[case]), rows["write_id"].unique().to_pylist())
            for case, rows in made.items()
        }
        writers = {case: partial(write_parquet, folder, "tokens", rows) for case, rows in made.items()}
        read_s, write_s = cpu_seconds(readers, rounds), cpu_seconds(writers, 2)
        result: dict[str, dict[str, float]] = {}
        print(f"{'':19} {'MB':>6}  read MB/CPU s  write MB/CPU s  bytes of 1 video  of 8  to float16: read  local  all")
        for case, rows in made.items():
            float16 = f"{case.partition(',')[0]}, float16"
            num_mb, plain = shards[float16]["size_bytes"] / 1e6, made[float16]
            found = {
                "read_mb_per_cpu_s": num_mb / read_s[case],
                "write_mb_per_cpu_s": num_mb / write_s[case],
                "bytes_ratio_1": bytes_ratio(folder, rows, 1),
                "bytes_ratio_8": bytes_ratio(folder, rows, 8),
                "read_of_float16": read_s[float16] / read_s[case],
                "local_bytes_of_float16": rows.select(BLOBS[:2]).nbytes / plain.select(BLOBS[:1]).nbytes,
                "blob_bytes_of_float16": rows.select(BLOBS).nbytes / plain.select(BLOBS).nbytes,
            }
            reads, writes, one, eight, *shares = found.values()
            told = f"{reads:13.0f}  {writes:14.0f}  {one:15.2f}x  {eight:.2f}x  {shares[0]:16.3f}"
            told += "".join(f"  {share:.3f}" for share in shares[1:])
            print(f"{case:19} {num_mb:6.1f}  {told}")
            result[case] = {key: round(value, 3) for key, value in found.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
