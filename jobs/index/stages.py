"""The index job's stages 4 to 6 as an executor runs them: each wraps one operator and reports to the tally."""

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from longvlm.jobs.cluster import logs, metrics
from longvlm.jobs.cluster.resources import DECODE_DEADLINE_S, DECODE_MEMORY_BYTES
from longvlm.jobs.cluster.retry import persist
from longvlm.jobs.cluster.tally import MAX_ATTEMPTS, WORKER, StageReporter
from longvlm.pipeline.decode.copy import VideoCopy, can_read_ahead, video_copy
from longvlm.pipeline.decode.device import Device
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.units import decode_units, failed_unit
from longvlm.pipeline.source.scratch import ScratchFolder
from longvlm.pipeline.store.shards import write_shards
from longvlm.pipeline.uris import is_local
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import from_spec


class Watch:
    """Stage 4: planned videos to frames, a unit at a time. One actor holds one killable decoder child.

    Called by two threads it reads ahead: one fetches its next video while the other decodes.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        tally: Any,
        has_thumbnails: bool = True,  # noqa: FBT001, FBT002 - an executor gives arguments by place
        device: Device = "cpu",
        long_decode_s: float = math.inf,
    ) -> None:
        self.recipe, self.has_thumbnails, self.long_decode_s = from_spec(recipe), has_thumbnails, long_decode_s
        self.stage, self.network = StageReporter("decode", tally), StageReporter("fetch", tally)
        self.parts = StageReporter("parts", tally)  # of long videos: the bar over `decode` counts videos
        self.stage.start_worker()
        self.decoder = Decoder(DECODE_DEADLINE_S, DECODE_MEMORY_BYTES, device)
        # Reads the indexes of sparse copies: in a child of its own, which starts when there is one, for the decoder's
        # is at work on the video before.
        self.surveyor = Decoder(DECODE_DEADLINE_S, DECODE_MEMORY_BYTES)
        self.scratch = ScratchFolder()
        self._decoding = threading.RLock()  # whose thread's turn it is

    def close(self) -> None:
        """End the children and remove the copies of videos; a worker that ends does both by itself."""
        self.decoder.close()
        self.surveyor.close()
        self.scratch.close()

    def __call__(self, plan: pa.Table) -> Iterator[pa.Table]:
        """PLAN rows in, FRAMES rows out, each as soon as it is decoded."""
        for video in plan.to_pylist():
            stage, key = self.stage, video["write_id"]
            if video["first_unit"] is not None:
                stage, key = self.parts, f"{key}/{video['first_unit']}"
            if stage.attempts([key])[0] >= MAX_ATTEMPTS:
                yield _noted(failed_unit(video, killer("decoder")))
                continue
            with ExitStack() as stack:
                if not can_read_ahead(video, self.scratch.name):
                    stack.enter_context(self._decoding)  # in its turn: then it may wait for room
                copy = stack.enter_context(self._fetched(video, key))
                stack.enter_context(self._decoding)
                clock = stack.enter_context(stage.work([key]))
                units = decode_units(
                    copy,
                    self.recipe,
                    self.decoder,
                    has_thumbnails=self.has_thumbnails,
                    long_decode_s=self.long_decode_s,
                )
                while (frames := clock.time(next, units, None)) is not None:
                    clock.cpu_s += frames["decode_ms"][0].as_py() / 1000  # burnt in the child
                    yield _noted(frames)

    @contextmanager
    def _fetched(self, video: dict[str, Any], key: str) -> Iterator[VideoCopy]:
        """The video's local copy, fetched; of a remote one the tally hears how long that took."""
        if is_local(video["uri"]):
            with video_copy(video, self.recipe, self.surveyor, self.scratch.name) as copy:
                yield copy
            return
        with ExitStack() as stack:
            with self.network.work([key]) as clock:
                fetching = video_copy(video, self.recipe, self.surveyor, self.scratch.name)
                spent_ms = self.surveyor.cpu_ms
                copy = clock.time(stack.enter_context, fetching)
                clock.cpu_s += (self.surveyor.cpu_ms - spent_ms) / 1000
            yield copy


class Encode:
    """Stage 5: frames to merged tokens. One actor holds one tower, on a GPU where the cluster has one."""

    def __init__(self, recipe: dict[str, Any], tally: Any, device: str, num_threads: int) -> None:
        # Decoders share the cores: OpenMP threads that spin while they wait would burn what decoding needs (measured:
        # seven times the CPU seconds). Has to be said before torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self.stage = StageReporter("encode", tally)
        self.stage.start_worker()
        import torch

        from longvlm.pipeline.vision.towers.families import load_tower

        torch.set_num_threads(num_threads)
        self.recipe = from_spec(recipe)
        self.tower = load_tower(self.recipe.tower.name, self.recipe.precision, device)

    def __call__(self, frames: pa.Table) -> pa.Table:
        """FRAMES rows in, ENCODED rows out, in the same order."""
        units = frames.select(["write_id", "unit"]).to_pylist()
        keys = [f"{unit['write_id']}/{unit['unit']}" for unit in units]
        attempts = self.stage.attempts(keys)
        if not any(attempts):
            return self._encode(frames, keys)
        # One of these may have killed the last worker. Alone, it cannot take the blame to its neighbours.
        alone = [
            self._encode(frames.slice(i, 1), [key]) if attempts[i] < MAX_ATTEMPTS else _refused(frames.slice(i, 1))
            for i, key in enumerate(keys)
        ]
        return pa.concat_tables(alone)

    def _encode(self, frames: pa.Table, keys: list[str]) -> pa.Table:
        from longvlm.pipeline.vision.encode import encode_units

        with self.stage.work(keys) as clock:
            encoded: pa.Table = clock.time(encode_units, frames, self.tower, self.recipe)
        was_good = frames["error_code"].is_null()  # what failed before was said before
        logs.failures(encoded.select(["video_id", "error_code", "error"]).filter(was_good).to_pylist())
        return encoded


def _noted(frames: pa.Table) -> pa.Table:
    """The units as they are, counted, and with a line in the log for each that failed."""
    metrics.count_frames(frames)
    logs.failures(frames.select(["video_id", "error_code", "error"]).to_pylist())
    return frames


def killer(worker: str) -> TerminalError:
    """The error of a unit that was at work in several workers that died."""
    return TerminalError(
        ErrorCode.LOST,
        f"{MAX_ATTEMPTS} {worker} workers died while working on this video; retry it alone with more memory.",
    )


def _refused(frames: pa.Table) -> pa.Table:
    row = {name: frames[name][0].as_py() for name in tables.ENCODED.names if name in frames.column_names}
    error = killer("encoder")
    row |= {"error_code": error.code, "error": error.message, "encode_ms": 0.0, "segments": []}
    logs.failures([row])
    return pa.Table.from_pylist([row], schema=tables.ENCODED)


class Write:
    """Stage 6: tokens to a closed shard of each table.

    Keeps nothing between calls, and the shards are closed before a call returns, so that Ray may run it again at any
    time: the shards of a call that did not return are referenced by nobody. An actor all the same, because Ray starts a
    process for a task that comes once in a while, which costs more than the writing.
    """

    def __init__(self, store_uri: str, recipe: str, tally: Any) -> None:
        self.store_uri = store_uri
        self.recipe = recipe
        self.stage = StageReporter("write", tally)

    def __call__(self, encoded: pa.Table) -> pa.Table:
        """ENCODED rows in, OUTCOMES rows out."""
        with self.stage.work([f"{WORKER}/{time.monotonic_ns()}"]) as clock:
            return clock.time(persist, self.store_uri, write_shards, self.store_uri, encoded, self.recipe)
