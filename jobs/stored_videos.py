"""Stored videos, read for whoever answers or learns from them: tokens and segments, or why a video has none."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from longvlm.pipeline.answering.about import SearchVectors, search_vectors
from longvlm.pipeline.store.shards import SEARCHED, by_video, read_segments, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.tokens import VideoTokens, videos_from_arrow
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError, TransientError

VIDEOS_PER_READ = 8  # one read serves several: their shards' footers are looked at once
READS_AHEAD = 2  # so that nobody waits for an object store
_SHOWN_WHEN = ("start_s", "end_s", "first_frame", "last_frame", "frames", "times_s")


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """What the store holds of a video."""

    tokens: VideoTokens
    segments: list[dict[str, Any]]  # _SHOWN_WHEN of each, in time order
    vectors: SearchVectors | None  # where they were asked for, and every segment has some


def read_videos(
    snapshot: Snapshot, write_ids: Sequence[str], *, with_embedding: bool = False
) -> list[StoredVideo | PipelineError]:
    """Some videos in one read, or why one has none; a broken shard fails only the videos that it holds."""
    try:
        tokens = videos_from_arrow(read_tokens(snapshot, write_ids))
        segments = by_video(read_segments(snapshot, write_ids, SEARCHED if with_embedding else ()))
    except (PipelineError, OSError) as error:
        if len(set(write_ids)) > 1:
            alone = (read_videos(snapshot, [write_id], with_embedding=with_embedding) for write_id in write_ids)
            return [video for (video,) in alone]
        if isinstance(error, PipelineError):
            return [error] * len(write_ids)
        unread = TransientError(ErrorCode.NETWORK, f"the stored tokens cannot be read ({error}); try again.")
        return [unread] * len(write_ids)
    return [_stored(tokens.get(write_id), segments.get(write_id)) for write_id in write_ids]


def stream_videos(
    snapshot: Snapshot, write_ids: Sequence[str], *, with_embedding: bool = False
) -> Iterator[StoredVideo | PipelineError]:
    """Videos in order, as `read_videos` reads them; while one is in use the next ones are read in a thread."""
    starts = iter(range(0, len(write_ids), VIDEOS_PER_READ))
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        ahead: deque[Future[list[StoredVideo | PipelineError]]] = deque()
        while True:
            while len(ahead) < READS_AHEAD and (start := next(starts, None)) is not None:
                some = write_ids[start : start + VIDEOS_PER_READ]
                ahead.append(pool.submit(read_videos, snapshot, some, with_embedding=with_embedding))
            if not ahead:
                return
            yield from ahead.popleft().result()


def _stored(tokens: VideoTokens | TerminalError | None, segments: pa.Table | None) -> StoredVideo | PipelineError:
    """One video out of what was read of it."""
    if isinstance(tokens, TerminalError):
        return tokens
    if tokens is None or segments is None or len(segments) != len(tokens.counts):
        return TerminalError(ErrorCode.BAD_TOKENS, "the video's segments and tokens differ; index the video again.")
    vectors = search_vectors(segments) if "embedding" in segments.column_names else None
    return StoredVideo(tokens, segments.select(_SHOWN_WHEN).to_pylist(), vectors)
