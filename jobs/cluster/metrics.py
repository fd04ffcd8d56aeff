"""The metrics of the jobs: what a run is doing, for dashboards and alerts.

Ray publishes them on the Prometheus endpoint of every node, under the names of `Metric.series`, about ten seconds after
they changed. They need no dashboard, and outside a Ray session they count nothing. Work that Ray repeats is counted
again, so these are figures of speed and health; the ones that add up are in the table `runs`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pyarrow as pa

_BUCKETS_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


@dataclass(frozen=True)
class Metric:
    """One metric: what it counts, and by what."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    meaning: str
    tags: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus knows it by."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{ending}" for ending in endings[self.kind])

    def record(self, value: float, **tags: str) -> None:
        """Add to a counter (nothing, where the value is 0), set a gauge, or observe in a histogram."""
        ray = sys.modules.get("ray")  # where nobody has loaded it there is no session
        if ray is not None and ray.is_initialized() and (value or self.kind != "counter"):
            _recorder(self)(value, tags)


@cache
def _recorder(metric: Metric) -> Any:
    """What takes a metric's values in this process."""
    from ray.util import metrics as ray_metrics

    if metric.kind == "histogram":
        made = ray_metrics.Histogram(metric.name, metric.meaning, boundaries=_BUCKETS_S, tag_keys=metric.tags)
        return made.observe
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.meaning, tag_keys=metric.tags).set
    return ray_metrics.Counter(metric.name, metric.meaning, tag_keys=metric.tags).inc


# By the tally, of every stage: decode works on videos, encode on units, write on shards, answer on questions.
WORK = Metric("counter", "longvlm_work", "Pieces of work finished.", ("stage",))
WORK_SECONDS = Metric("histogram", "longvlm_work_seconds", "Wall seconds for one piece of work.", ("stage",))
BUSY_SECONDS = Metric("counter", "longvlm_busy_seconds", "Wall seconds that workers were busy.", ("stage",))
CPU_SECONDS = Metric("counter", "longvlm_cpu_seconds", "CPU seconds that the work took.", ("stage",))
TOKENS = Metric("counter", "longvlm_tokens", "Tokens of questions: phase prefill or decode.", ("phase",))

# By the stages.
UNITS = Metric("counter", "longvlm_units", "Units of frames decoded; failed ones say why.", ("code",))
FRAMES = Metric("counter", "longvlm_frames", "Frames decoded.")
QUESTIONS = Metric("counter", "longvlm_questions", "Questions answered, unparsed or failed.", ("status",))

# By the driver.
VIDEOS = Metric("counter", "longvlm_videos", "Videos settled: indexed, or failed with a code.", ("status", "code"))
VIDEO_SECONDS = Metric("counter", "longvlm_video_seconds", "Seconds of video indexed.")
QUEUE = Metric("gauge", "longvlm_queue", "Videos (index) or questions (answer) not settled yet.", ("job",))
COMMITS = Metric("counter", "longvlm_commits", "Commits to the store.", ("job",))
COMMIT_SECONDS = Metric("histogram", "longvlm_commit_seconds", "Wall seconds for one commit.", ("job",))
WRITTEN_BYTES = Metric("counter", "longvlm_written_bytes", "Bytes of shards committed.", ("table",))

ALL = tuple(value for value in vars().copy().values() if isinstance(value, Metric))


def count_work(stage: str, done: int, busy_s: float, cpu_s: float) -> None:
    """Some pieces of work of a stage ended, after so many seconds together."""
    WORK.record(done, stage=stage)
    BUSY_SECONDS.record(busy_s, stage=stage)
    CPU_SECONDS.record(cpu_s, stage=stage)
    if done:
        WORK_SECONDS.record(busy_s / done, stage=stage)


def count_frames(frames: pa.Table) -> None:
    """Units of tables.FRAMES were decoded, or failed to be."""
    for code, segments in zip(frames["error_code"].to_pylist(), frames["segments"].to_pylist(), strict=True):
        UNITS.record(1, code=code or "")
        FRAMES.record(sum(len(segment["frames"]) for segment in segments))


def count_settled(rows: list[dict[str, Any]]) -> None:
    """Some VIDEOS rows are part of the store."""
    for row in rows:
        VIDEOS.record(1, status=row["status"], code=row["error_code"] or "")
        VIDEO_SECONDS.record(row["duration_s"] if row["status"] == "indexed" else 0)


@contextmanager
def timed_commit(job: str) -> Iterator[None]:
    """Count what the body commits, if it does: a commit, and its seconds."""
    begun_s = time.perf_counter()
    yield
    COMMIT_SECONDS.record(time.perf_counter() - begun_s, job=job)
    COMMITS.record(1, job=job)


def count_written(outcomes: pa.Table) -> None:
    """The shards that tables.OUTCOMES name are part of the store."""
    for table in ("tokens", "segments"):
        shards = {shard["path"]: shard["size_bytes"] for shard in outcomes[f"{table}_shard"].to_pylist() if shard}
        WRITTEN_BYTES.record(sum(shards.values()), table=table)
