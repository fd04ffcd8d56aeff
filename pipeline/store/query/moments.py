"""Moments: the frames of a snapshot's live segments by their search vectors, in one memory-mapped file.

A moment is a frame that was looked at, from when it begins to be shown until the next one does. The file is built once
for what a snapshot holds and lies in the temporary directory, in a folder of this user's alone; a snapshot that holds
anything else gets another one in its place. Reading it copies nothing, so that the pages of several searches are those
of the disk's cache.

Shape letters: M moments, S segments, E search channels.
"""

# ruff: noqa: N803, N806 - arrays are named by their shape

import hashlib
import shutil
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from longvlm.pipeline.private import private_folder
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import clock
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import quoted

_FOLDER = "longvlm-search-"
_ROWS = """
SELECT write_id, segment, uri, external_id, start_s, end_s, times_s, embedding, frame_embeddings
FROM segments WHERE embedding IS NOT NULL ORDER BY write_id, segment
"""
_FILE = pa.schema(
    [
        ("write_id", pa.string()),
        ("segment", pa.int32()),
        ("uri", pa.string()),
        ("external_id", pa.string()),
        ("end_s", pa.float64()),
        ("starts_s", pa.list_(pa.float64())),  # of its moments: the first begins with the segment
        ("times_s", pa.list_(pa.float64())),  # when their frames begin to be shown
        ("lengths", pa.list_(pa.float32())),  # of their vectors
        ("vectors", pa.binary()),  # [moments, E] int8
    ]
)
_SEGMENTS_PER_BATCH = 1024  # 8 MB of ten frames each, 768 wide
_ROWS_AT_ONCE = 1024  # whose vectors are floats at a time, so that they stay in the cache
_MEMORY_GB = 2  # of DuckDB's, which sorts on the disk beyond that
_DRAFT_S = 3600.0  # without a change, and nobody is at a draft any more
_MAX_INT8 = 127


@dataclass(frozen=True, eq=False)
class Moments:
    """All moments of a snapshot, ordered by video and time."""

    segments: pa.Table  # S: write_id, segment, uri, external_id, end_s
    segment: NDArray[np.int64]  # M: of which row of `segments` each is
    starts_s: NDArray[np.float64]  # M: when each begins
    times_s: NDArray[np.float64]  # M: and when its frame begins to be shown
    lengths: NDArray[np.float32]  # M: of the vectors
    vectors: tuple[NDArray[np.int8], ...]  # [.., E]: in parts, as they lie in the file
    video: NDArray[np.int64]  # M: a number for the video of each; they grow

    @property
    def num_moments(self) -> int:
        """M."""
        return len(self.segment)

    def end_s(self, place: int) -> float:
        """When a moment ends: as the next of its video begins, or with its segment."""
        is_last = place + 1 == self.num_moments or self.video[place + 1] != self.video[place]
        if is_last:
            return float(self.segments["end_s"][int(self.segment[place])].as_py())
        return float(self.starts_s[place + 1])

    def cosines(self, query_E: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine of each moment to a query of length 1, [M].

        Raises:
            InputError: the vectors are of another width than the query.
        """
        products_M = np.empty(len(self.segment), np.float32)
        floats = np.empty((_ROWS_AT_ONCE, len(query_E)), np.float32)
        start = 0
        for part in self.vectors:
            if part.shape[1] != len(query_E):
                raise InputError(
                    f"the store's embeddings are {part.shape[1]} wide and the query's is {len(query_E)}; "
                    "search with the model that the store was indexed with."
                )
            for first in range(0, len(part), _ROWS_AT_ONCE):
                some = part[first : first + _ROWS_AT_ONCE]
                np.copyto(floats[: len(some)], some)
                np.dot(floats[: len(some)], query_E, out=products_M[start : start + len(some)])
                start += len(some)
        return products_M / self.lengths


def open_moments(snapshot: Snapshot) -> Moments:
    """The moments of a snapshot, out of the file that was built for it, or is now.

    A segment without vectors of its frames, indexed by an older version, is one moment with the vector of the whole.

    Raises:
        InputError: a file that the snapshot names is gone or out of reach, or the place of the file is another user's.
    """
    store, state = _names(snapshot)
    try:
        path = private_folder(_FOLDER) / f"{store}-{state}.arrow"
        while True:
            with suppress(FileNotFoundError, pa.ArrowInvalid):  # taken away by who built the next one, or cut off
                return _opened(path)
            _build(snapshot, path)
    except OSError as error:
        raise InputError(
            f"the vectors to search cannot be laid out in the temporary directory ({error}); make room there, or set "
            "TMPDIR to another one."
        ) from error


def drop_moments(snapshot: Snapshot) -> None:
    """Remove what was built for a store on this machine, since it holds vectors of videos that are to be forgotten."""
    with suppress(PermissionError):  # then nothing there was made by this user
        _remove(private_folder(_FOLDER).glob(f"{_names(snapshot)[0]}-*"))


def _names(snapshot: Snapshot) -> tuple[str, str]:
    """Two hashes: of which store a snapshot is, and of all that decides which segments are live in it."""
    files = [file.uri for name in ("segments", "videos", "recipes") for file in snapshot.table(name).files]
    places = {uri.rpartition("/")[0].rpartition("/")[0] for uri in files}
    store, state = (hashlib.sha256("\n".join(sorted(part)).encode()).hexdigest()[:16] for part in (places, files))
    return store, state


def _build(snapshot: Snapshot, path: Path) -> None:
    """Write the file of a snapshot, and remove those of the same store's other snapshots."""
    draft = path.with_name(f"{path.stem}-{uuid.uuid4()}.draft")
    try:
        with catalog.connect(snapshot, ("segments",), apart=True) as con, pa.OSFile(str(draft), "wb") as sink:
            con.execute(f"SET temp_directory = {quoted(f'{draft}-sort')}")
            con.execute(f"SET memory_limit = '{_MEMORY_GB}GB'")
            with catalog.queries_as_sentences("the search"), pa.ipc.new_file(sink, _FILE) as file:
                for batch in con.sql(_ROWS).to_arrow_reader(_SEGMENTS_PER_BATCH):
                    if batch.num_rows:
                        file.write_batch(_as_moments(batch))
        draft.replace(path)
        others = path.parent.glob(f"{path.name.partition('-')[0]}-*")
        _remove(other for other in others if other != path and (other.suffix == ".arrow" or _is_left(other)))
    finally:
        draft.unlink(missing_ok=True)


def _is_left(draft: Path) -> bool:
    """Whether a draft, or what DuckDB sorted for one, is that of somebody who was killed."""
    with suppress(FileNotFoundError):
        return draft.stat().st_mtime < clock.now_s() - _DRAFT_S
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _as_moments(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Some segments as they stand in the file."""
    embeddings_SE = rows["embedding"].flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
    others = rows.select(["start_s", "times_s", "frame_embeddings"]).to_pylist()
    columns: dict[str, list[Any]] = {name: [] for name in ("starts_s", "times_s", "lengths", "vectors")}
    for row, embedding_E in zip(others, embeddings_SE, strict=True):
        has_frames = row["frame_embeddings"] is not None
        times_s = row["times_s"] if has_frames else [row["start_s"]]
        blob = row["frame_embeddings"] if has_frames else _as_int8(embedding_E)
        vectors_FE = np.frombuffer(blob, np.int8).reshape(len(times_s), -1)
        columns["starts_s"].append([row["start_s"], *times_s[1:]])
        columns["times_s"].append(times_s)
        columns["lengths"].append(np.maximum(np.linalg.norm(vectors_FE.astype(np.float32), axis=1), 1))
        columns["vectors"].append(blob)
    kept = {name: rows[name] for name in ("write_id", "segment", "uri", "external_id", "end_s")}
    return pa.RecordBatch.from_pydict({**kept, **columns}, schema=_FILE)


def _vectors(batch: pa.RecordBatch) -> NDArray[np.int8]:
    """The vectors of a batch where they lie in the file."""
    offsets = np.frombuffer(batch["vectors"].buffers()[1], np.int32)[batch["vectors"].offset :]
    first, end = int(offsets[0]), int(offsets[len(batch)])
    values = np.frombuffer(batch["vectors"].buffers()[2], np.int8, end - first, first)
    return values.reshape(len(batch["lengths"].flatten()), -1)


def _as_int8(embedding_E: NDArray[np.float32]) -> bytes:
    largest = max(float(np.abs(embedding_E).max()), float(np.finfo(np.float32).tiny))
    return np.rint(embedding_E / largest * _MAX_INT8).astype(np.int8).tobytes()


def _opened(path: Path) -> Moments:
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all()
    segment_M = np.repeat(np.arange(len(rows)), pc.list_value_length(rows["times_s"]).to_numpy())
    return Moments(
        segments=rows.select(["write_id", "segment", "uri", "external_id", "end_s"]),
        segment=segment_M,
        starts_s=pc.list_flatten(rows["starts_s"]).to_numpy(),
        times_s=pc.list_flatten(rows["times_s"]).to_numpy(),
        lengths=pc.list_flatten(rows["lengths"]).to_numpy(),
        vectors=tuple(_vectors(batch) for batch in rows.to_batches()),
        video=pc.rank(rows["write_id"], tiebreaker="dense").to_numpy()[segment_M],
    )
