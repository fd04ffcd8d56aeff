"""A synthetic bucket of as many videos as one likes, and a stand-in for decoding and encoding them.

The bucket speaks as much of S3 as listing needs: 1000 keys an answer. Watching a video is made up: one segment of two
small tokens, written as shards of 1000 videos by the store's own code.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.shards import write_shards
from longvlm.schemas import tables

KEYS_A_PAGE, VIDEOS_A_SHARD = 1000, 1000
TOKENS, DIM, LAYERS = 2, 16, 1
SOURCE = Source("s3://bucket/footage")
_CHANGED = datetime(2026, 11, 1, tzinfo=UTC)


class MadeUpBucket(AbstractFileSystem):
    """Answers `list_objects_v2` of a bucket whose contents follow from two numbers.

    From one night to the next a hundredth of the videos changes, a 200th is gone, as many are new, and a 500th moved.
    """

    protocol = ("s3", "s3a")
    cachable = False
    req_kw: ClassVar[dict[str, Any]] = {}
    num_videos, night, num_requests = 0, 0, 0  # of the class: fsspec makes objects as it likes

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Only the folder is ever asked for."""
        return {"name": path, "type": "directory", "size": 0}

    def call_s3(self, method: str, **request: Any) -> dict[str, Any]:
        """A page of keys."""
        assert method == "list_objects_v2"
        MadeUpBucket.num_requests += 1
        start = int(request.get("ContinuationToken", 0))
        end = start + KEYS_A_PAGE
        last = self.num_videos + (self.num_videos // 200 if self.night else 0)
        keys = [entry for n in range(start, min(end, last)) if (entry := self._entry(n))]
        return {"Contents": keys, "IsTruncated": end < last, "NextContinuationToken": str(end)}

    def _entry(self, n: int) -> dict[str, Any] | None:
        changes, goes, moves = (self.night and n % each == at for each, at in ((100, 0), (200, 1), (500, 3)))
        if goes:
            return None
        folder = "archive" if moves else f"camera-{n % 997:03}"
        etag = f'"{n + (n % 100 == 0) * self.night * 1_000_000_007:032x}"' if changes else f'"{n:032x}"'
        size = 1_000_000 + n % 9973
        return {"Key": f"footage/{folder}/{n:08}.mp4", "ETag": etag, "Size": size, "LastModified": _CHANGED}


def serve(num_videos: int, night: int = 0) -> None:
    """Let s3:// lead to the made-up bucket in this process, as it is in the first or a later night."""
    MadeUpBucket.num_videos, MadeUpBucket.night = num_videos, night
    fsspec.register_implementation("s3", MadeUpBucket, clobber=True)


def watch(store_uri: str, recipe: str, plan: pa.Table) -> Iterator[pa.Table]:
    """In place of stages 4 to 6 of the index job: tables.PLAN in, batches of tables.OUTCOMES out."""
    for start in range(0, len(plan), VIDEOS_A_SHARD):
        yield write_shards(store_uri, encoded(plan.slice(start, VIDEOS_A_SHARD)), recipe)


def encoded(videos: pa.Table) -> pa.Table:
    """A good unit for each row of tables.PLAN, all alike."""
    number = len(videos)
    segment = {
        "segment": 0, "start_s": 0.0, "end_s": 10.0, "first_frame": 0, "last_frame": 99, "num_frames": 10,
        "num_tokens": TOKENS, "dim": DIM, "dtype": "float16", "local": bytes(2 * TOKENS * DIM),
        "sizes": bytes(2 * TOKENS), "spans": bytes(8 * TOKENS), "cls": bytes(2 * LAYERS * DIM),
    }  # fmt: skip
    constants = {
        "unit": 0, "num_units": 1, "duration_s": 10.0, "fps": 10.0, "width": 64, "height": 48, "num_frames": 100,
        "codec": "h264", "decoder": "made-up", "num_segments": 1, "error_code": None, "error": None,
        "decode_ms": 5.0, "keyframe_shift_s": None, "encode_ms": 7.0, "segments": [segment],
    }  # fmt: skip
    columns = {name: pa.repeat(pa.scalar(value, tables.ENCODED.field(name).type), number)
               for name, value in constants.items() if name != "segments"}  # fmt: skip
    columns["segments"] = pa.array([constants["segments"]] * number, tables.ENCODED.field("segments").type)
    columns |= {name: videos[name] for name in ("video_id", "write_id")}
    columns |= {field.name: pa.nulls(number, field.type) for field in tables.ENCODED if field.name not in columns}
    return pa.table(columns).select(tables.ENCODED.names).cast(tables.ENCODED)


def files_below(folder: Path) -> dict[str, Any]:
    """How many files a store has and what they take, data and log apart."""
    data = list(folder.glob("*/*.parquet"))
    log = [path for path in folder.glob("*/_delta_log/*") if path.is_file()]
    return {
        "files": len(data),
        "mb": round(sum(path.stat().st_size for path in data) / 1e6, 1),
        "log_files": len(log),
        "log_mb": round(sum(path.stat().st_size for path in log) / 1e6, 1),
    }


def peak_mb() -> int:
    """The most memory that this process ever held; ru_maxrss would start from what its parent had when it forked."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1000


class Stopwatch:
    """Seconds between calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What went by since the last call was for this."""
        now = time.perf_counter()
        self.seconds[f"{name}_s"] = round(now - self._last, 3)
        self._last = now
