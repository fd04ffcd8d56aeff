"""The read stage of training as Ray Data runs it: planned examples in, examples with their tokens out.

A module of its own because what it needs is loaded in a third of the time that a language model's code takes.
"""

import json
import os
import sys
from typing import Any

import pyarrow as pa
import torch

from longvlm.jobs.answer.options import ROOM_FOR_QUESTION
from longvlm.jobs.stored_videos import StoredVideo, read_videos
from longvlm.jobs.train.worker_config import ReaderConfig
from longvlm.pipeline.models.prefix import SegmentTimes, VideoPrefix, prefix_of
from longvlm.pipeline.training.packing import Caption, Example
from longvlm.pipeline.vision.budget import Budget, fit
from longvlm.schemas.errors import PipelineError, TerminalError

EXAMPLES = pa.schema(  # an example with its tokens, on its way to a worker
    [
        ("step", pa.int64()),
        ("uri", pa.string()),
        ("conversations", pa.string()),  # JSON: [id, [[question, answer], ...], at_s] each
        ("prefix", pa.large_binary()),  # [N, dim]
        ("dim", pa.int32()),
        ("dtype", pa.string()),
        ("num_whole_frames", pa.int32()),
        ("num_global", pa.int32()),
        ("counts", pa.list_(pa.int32())),
        ("starts_s", pa.list_(pa.float64())),
        ("ends_s", pa.list_(pa.float64())),
        ("positions", pa.binary()),  # [N, 3] float64; null where the tower gives none
        ("patch_grid", pa.list_(pa.int32())),
        ("error", pa.string()),  # why there are no tokens; null where there are
    ]
)


class Reader:
    """A reader of stored tokens: planned examples (PLANNED) in, with tokens (EXAMPLES) out, in the same order.

    Args:
        config: what to read, and how.
        low_priority: use a core only while nobody else wants it: a reader in a process of its own runs far ahead, and
            must not take cores from those who train.
    """

    def __init__(self, config: ReaderConfig, *, low_priority: bool = False) -> None:
        self.config, self.budget = config, _budget(config)
        if low_priority:
            torch.set_num_threads(1)
            _lower_priority()

    def __call__(self, plan: pa.Table) -> pa.Table:
        """Read one block of the plan."""
        rows = plan.to_pylist()
        videos = read_videos(self.config.snapshot, [row["write_id"] for row in rows])
        examples = [_example_row(row) | self._columns(video) for row, video in zip(rows, videos, strict=True)]
        return pa.Table.from_pylist(examples, EXAMPLES)

    def _columns(self, video: StoredVideo | PipelineError) -> dict[str, Any]:
        """A video within its budget in columns of EXAMPLES, or why there is none."""
        if isinstance(video, PipelineError):
            return {"error": video.message}
        try:
            tokens = fit(video.tokens, self.budget)
        except TerminalError as error:
            return {"error": error.message}
        return _prefix_columns(prefix_of(tokens, video.segments, self.config.sight))


def _budget(config: ReaderConfig) -> Budget:
    """How tokens are merged to fit: as answering does where a context could not hold it, evenly."""
    room = config.longest - 2 * ROOM_FOR_QUESTION
    max_tokens = room if room > config.sight.num_global_tokens + config.sight.num_marker_tokens else None
    return config.sight.budget(max_tokens, config.tokens_per_segment, "even")


def _lower_priority() -> None:
    """Lowest priority, for this thread and those it starts. Ray's workers are at 15 of 19, too near for niceness."""
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _prefix_columns(prefix: VideoPrefix) -> dict[str, Any]:
    """A prefix in columns of EXAMPLES; `example_from_row` reads them."""
    assert prefix.times is not None, "prefix_of says when segments began"
    return {
        "prefix": prefix.rows.numpy().tobytes(),
        "dim": prefix.rows.shape[1],
        "dtype": str(prefix.rows.dtype).removeprefix("torch."),
        "num_whole_frames": prefix.num_whole_frames,
        "num_global": prefix.times.num_global,
        "counts": list(prefix.times.counts),
        "starts_s": list(prefix.times.starts_s),
        "ends_s": list(prefix.times.ends_s),
        "positions": None if prefix.positions is None else prefix.positions.numpy().tobytes(),
        "patch_grid": prefix.patch_grid and list(prefix.patch_grid),
    }


def _example_row(row: dict[str, Any]) -> dict[str, Any]:
    conversations = [
        [one["id"], [[turn["question"], turn["answer"]] for turn in one["turns"]], one["at_s"]]
        for one in row["conversations"]
    ]
    return {"step": row["step"], "uri": row["uri"], "conversations": json.dumps(conversations)}


def example_from_row(row: dict[str, Any]) -> Example:
    """The example of a row of EXAMPLES; without tokens it has no conversations."""
    if row["error"] is not None:
        return Example(VideoPrefix(torch.empty(0, 1)), [])
    conversations = [
        tuple((question, answer) for question, answer in turns) if at_s is None else Caption(at_s, turns[0][1])
        for _, turns, at_s in json.loads(row["conversations"])
    ]
    rows = torch.frombuffer(bytearray(row["prefix"]), dtype=getattr(torch, row["dtype"])).view(-1, row["dim"])
    times = SegmentTimes(row["num_global"], *(tuple(row[name]) for name in ("counts", "starts_s", "ends_s")))
    positions = None
    if row["positions"] is not None:
        positions = torch.frombuffer(bytearray(row["positions"]), dtype=torch.float64).view(-1, 3)
    grid = None if row["patch_grid"] is None else (row["patch_grid"][0], row["patch_grid"][1])
    return Example(VideoPrefix(rows, row["num_whole_frames"], times, positions, grid), conversations)
