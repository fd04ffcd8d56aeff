"""The read stage of training as Ray Data runs it: planned examples in, examples with their tokens out.

A module of its own because several processes of a run load it, and what it needs is loaded in a third of the time that
a language model's code takes.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from longvlm.jobs.answer.options import ROOM_FOR_QUESTION
from longvlm.pipeline.models.contract import Timeline
from longvlm.pipeline.models.markers import timeline_of
from longvlm.pipeline.store.shards import by_video, read_segments, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.training.packing import Caption, Example
from longvlm.pipeline.vision.budget import fit
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas import tables
from longvlm.schemas.errors import PipelineError
from longvlm.schemas.recipe import AnswerRecipe

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
        ("error", pa.string()),  # why there are no tokens; null where there are
    ]
)


@dataclass(frozen=True)
class ReaderConfig:
    """The configuration of a reader: all that it has to know besides the plan."""

    snapshot: Snapshot
    num_global: int  # rows that the model's projector reads ahead of the local ones
    longest: int  # tokens of a sequence
    tokens_per_segment: int | None
    num_beside: int  # rows that time markers may take beside a segment's

    @property
    def budget(self) -> AnswerRecipe:
        """How tokens are merged to fit: as answering does where a context could not hold it, evenly."""
        room = self.longest - 2 * ROOM_FOR_QUESTION
        return AnswerRecipe(
            "", "", "", budget=room if room > self.num_global + self.num_beside else None,
            tokens_per_segment=self.tokens_per_segment, focus="even",
        )  # fmt: skip


class Reader:
    """A reader of stored tokens: planned examples (PLANNED) in, with tokens (EXAMPLES) out, in the same order.

    Args:
        config: what to read, and how.
        low_priority: use a core only while nobody else wants it: a reader in a process of its own runs far ahead, and
            must not take cores from those who train.
    """

    def __init__(self, config: ReaderConfig, *, low_priority: bool = False) -> None:
        self.config = config
        if low_priority:
            torch.set_num_threads(1)
            _lower_priority()

    def __call__(self, plan: pa.Table) -> pa.Table:
        """Read one block of the plan."""
        rows = plan.to_pylist()
        write_ids = sorted({row["write_id"] for row in rows})
        try:
            tokens, segments = self._read(write_ids)
        except (PipelineError, OSError) as error:
            examples = [_example_row(row) | {"error": str(error)} for row in rows]
        else:
            examples = [self._read_row(row, tokens.get(row["write_id"]), segments.get(row["write_id"])) for row in rows]
        return pa.Table.from_pylist(examples, EXAMPLES)

    def _read(self, write_ids: list[str]) -> tuple[dict[str, pa.Table], dict[str, pa.Table]]:
        snapshot = self.config.snapshot
        if not write_ids:
            return {}, {}
        return by_video(read_tokens(snapshot, write_ids)), by_video(read_segments(snapshot, write_ids))

    def _read_row(self, row: dict[str, Any], tokens: pa.Table | None, segments: pa.Table | None) -> dict[str, Any]:
        config = self.config
        try:
            video = from_arrow(tables.TOKENS.empty_table() if tokens is None else tokens)
            video = fit(video, config.budget, num_global=config.num_global, num_beside=config.num_beside)
        except PipelineError as error:
            return _example_row(row) | {"error": str(error)}
        if segments is None:
            return _example_row(row) | {"error": "the video's segments are gone; index it again."}
        prefix = video.prefix(with_global=config.num_global > 0)
        timeline = timeline_of(video, segments.to_pylist(), config.num_global)
        return _example_row(row) | {
            "prefix": prefix.numpy().tobytes(),
            "dim": video.dim,
            "dtype": str(prefix.dtype).removeprefix("torch."),
            "num_whole_frames": None if config.num_global else video.num_whole_frames,
            "num_global": timeline.num_global,
            "counts": list(timeline.counts),
            "starts_s": list(timeline.starts_s),
        }


def _lower_priority() -> None:
    """Lowest priority, for this thread and those it starts. Ray's workers are at 15 of 19, too near for niceness."""
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _example_row(row: dict[str, Any]) -> dict[str, Any]:
    conversations = [
        [one["id"], [[turn["question"], turn["answer"]] for turn in one["turns"]], one["at_s"]]
        for one in row["conversations"]
    ]
    return {"step": row["step"], "uri": row["uri"], "conversations": json.dumps(conversations)}


def example_from_row(row: dict[str, Any]) -> Example:
    """The example of a row of EXAMPLES; without tokens it has no conversations."""
    if row["error"] is not None:
        return Example(torch.empty(0, 1), [])
    conversations = [
        tuple((question, answer) for question, answer in turns) if at_s is None else Caption(at_s, turns[0][1])
        for _, turns, at_s in json.loads(row["conversations"])
    ]
    prefix = torch.frombuffer(bytearray(row["prefix"]), dtype=getattr(torch, row["dtype"])).view(-1, row["dim"])
    timeline = Timeline(row["num_global"], tuple(row["counts"]), tuple(row["starts_s"]))
    return Example(prefix, conversations, row["num_whole_frames"], timeline)
