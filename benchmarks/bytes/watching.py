"""The decode stage of the index job over a bucket, in as many processes as there are cores, and what came of it."""

import hashlib
import json
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import pyarrow as pa

from benchmarks.bytes.server import NAME, DistantBucket
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.index.stages import Watch
from longvlm.pipeline.source import sparse
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas import tables
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.recipe import paper
from longvlm.schemas.tower import TowerSpec

_LOADED = ["benchmarks.bytes.watching", "s3fs"]  # once, by a server that forks the workers of all runs
_START_S = 120.0  # for processes to start and watch a first video
_TOWER = TowerSpec("none", "none", 24, (16, 16), 1024, 224, has_cls=True, search_dim=None)
RECIPES = {  # by how frames are decoded: exactly, one of each of paper's segments, for these files are minutes long
    "keyframe": replace(paper(_TOWER), decode="keyframe"),
    "exact": replace(paper(_TOWER), frames_per_segment=1),
}


@dataclass(frozen=True)
class Watching:
    """One run over the bucket: seconds, what the server counted by key, and a digest of each video's rows by URI."""

    wall_s: float
    cpu_s: float
    server_cpu_s: float
    sent_bytes: dict[str, int]
    requests: dict[str, int]
    digests: dict[str, str]


def whole_only() -> None:
    """Have this process download every object whole, however large it is."""
    sparse.MIN_BYTES = 1 << 62


def watch_bucket(bucket: DistantBucket, keys: Collection[str], decode: str, *, whole: bool, readers: int) -> Watching:
    """Decode some videos once, as one of RECIPES has it, each worker taking the next; the clock runs when all started.

    A worker's first video is not counted: it starts the client of the bucket and the decoder's child.
    """
    cores = len(os.sched_getaffinity(0))
    context = get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    gate, place = context.Barrier(cores + 1), context.Value("q", 0)
    shared = (gate, place, bucket.environment)
    with ProcessPoolExecutor(cores, mp_context=context, initializer=_share, initargs=shared) as pool:
        workers = [pool.submit(_work, keys, decode, readers, whole=whole) for _ in range(cores)]
        gate.wait(_START_S)
        bucket.take_counts()
        gate.wait()
        begun_s = time.perf_counter()
        done = [worker.result() for worker in workers]
        wall_s = time.perf_counter() - begun_s
    counts = bucket.take_counts()
    return Watching(
        wall_s,
        cpu_s=sum(cpu_s for cpu_s, _ in done),
        server_cpu_s=counts["cpu_s"],
        sent_bytes=counts["bytes"],
        requests=counts["requests"],
        digests={uri: digest for _, digests in done for uri, digest in digests.items()},
    )


# --- in a worker ---

_shared: dict[str, Any] = {}


def _share(gate: Any, place: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    _shared.update(gate=gate, place=place)


def _work(keys: Collection[str], decode: str, readers: int, *, whole: bool) -> tuple[float, dict[str, str]]:
    """CPU seconds of this worker and its decoder's child, and the digests of the videos that it took."""
    if whole:
        whole_only()
    uris = {f"s3://{NAME}/{key}" for key in keys}
    listing = [row for row in list_source(Source(f"s3://{NAME}")).to_pylist() if row["uri"] in uris]
    operator = Watch(RECIPES[decode].spec(), Tally(), has_thumbnails=False)
    for _ in operator(_plan(listing[0])):
        pass
    _shared["gate"].wait(_START_S)
    _shared["gate"].wait(_START_S)
    begun_s, child_ms = time.process_time(), _children_ms(operator)
    with ThreadPoolExecutor(readers) as threads:
        reading = [threads.submit(_read, operator, listing) for _ in range(readers)]
        digests = {uri: digest for reader in reading for uri, digest in reader.result().items()}
    cpu_s = time.process_time() - begun_s + (_children_ms(operator) - child_ms) / 1000
    operator.close()
    return cpu_s, digests


def _children_ms(operator: Watch) -> float:
    return operator.decoder.cpu_ms + operator.surveyor.cpu_ms


def _read(operator: Watch, listing: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Watch whichever video is next, until there is none: a digest of each one's rows by URI."""
    digests: dict[str, str] = {}
    while True:
        with _shared["place"].get_lock():
            place = _shared["place"].value
            _shared["place"].value += 1
        if place >= len(listing):
            return digests
        digest = hashlib.sha256()
        for unit in operator(_plan(listing[place])):
            about = unit.drop_columns(["frames", "write_id", "decode_ms", "read_bytes", "whole_because"]).to_pylist()[0]
            if about["error_code"] is not None:
                raise RuntimeError(f"the run is no measurement: {listing[place]['uri']}: {about['error']}")
            digest.update(json.dumps(about, sort_keys=True).encode())
            digest.update(unit["frames"].chunk(0).buffers()[2])
        digests[listing[place]["uri"]] = digest.hexdigest()


def _plan(row: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([row | {"write_id": new_write_id(), "attempts": 1}], schema=tables.PLAN)
