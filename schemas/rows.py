"""Rows of the index job's batches as its accounting takes them: see `tables`, whose columns they have."""

from datetime import datetime
from typing import TypedDict


class WorkRow(TypedDict):
    """A row of LISTING that is to be watched."""

    video_id: str
    source: str
    uri: str
    external_id: str | None
    etag: str | None
    size_bytes: int | None
    modified_at: datetime | None
    error_code: str | None
    error: str | None
    attempts: int | None  # at this content; None before the first


class PlanRow(WorkRow):
    """A row of PLAN."""

    write_id: str
    first_unit: int | None
    end_unit: int | None


class ShardRow(TypedDict):
    """A SHARD."""

    path: str
    size_bytes: int
    stats: str


class OutcomeRow(TypedDict):
    """A row of OUTCOMES."""

    video_id: str
    write_id: str
    unit: int
    num_units: int
    duration_s: float | None
    fps: float | None
    width: int | None
    height: int | None
    num_frames: int | None
    codec: str | None
    decoder: str | None
    num_segments: int | None
    error_code: str | None
    error: str | None
    decode_ms: float | None
    read_bytes: int | None
    whole_because: str | None
    rest_ms: float | None
    cpu_because: str | None
    keyframe_shift_s: float | None
    encode_ms: float | None
    tokens_shard: ShardRow | None
    segments_shard: ShardRow | None
