"""Invariants of a store, whatever happened to those who write to it."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from deltalake.exceptions import DeltaError

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import by_video, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.pipeline.uris import is_local
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.errors import InputError, PipelineError

_LIVE = "SELECT uri, video_id, write_id, num_segments, num_frames FROM live_videos"
_ROWS = "SELECT write_id, count(*) AS n, count(DISTINCT segment) AS num_distinct FROM {} GROUP BY write_id"
_BY_RUN = "SELECT run_id, status, count(*) AS n FROM ledger_videos WHERE status <> 'deleted' GROUP BY ALL"
_VIEWS = ("live_videos", "failed_videos", "videos", "failures", "segments", "tokens", "answers", "answers_wide", "runs")


@dataclass
class Findings:
    """The findings of a check: what is there, and what is wrong; videos go by the names of their files."""

    live: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)  # of live videos, as digests
    failed: dict[str, str] = field(default_factory=dict)  # error codes
    errors: dict[str, str] = field(default_factory=dict)  # their sentences
    by_run: Counter[tuple[str, str]] = field(default_factory=Counter)  # ledger rows by run and status
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def inspect(store_uri: str, num_frames: Mapping[str, int]) -> Findings:
    """Check everything that a store shows.

    Args:
        store_uri: of the store; one that was not made yet shows nothing.
        num_frames: of the good videos, by name, where they are known; what is live must have as many.
    """
    found = Findings()
    try:
        if store := Store.find(store_uri):
            snapshot = store.pin()
            _check_bytes(found, snapshot)
            _check_views(found, snapshot, num_frames)
            _check_tokens(found, snapshot)
            _check_index_file(store_uri)
    except (PipelineError, InputError, DeltaError, duckdb.Error, OSError) as error:
        found.broken.append(f"not to be read: {type(error).__name__}: {catalog.first_line(error)}")
    return found


def name_of(uri: str) -> str:
    """What a video is called here."""
    return uri.rpartition("/")[2]


def _check_views(found: Findings, snapshot: Snapshot, num_frames: Mapping[str, int]) -> None:
    with catalog.connect(snapshot) as con:
        for view in _VIEWS:
            con.execute(f"SELECT count(*) FROM {view}").fetchall()
        live = catalog.query(con, _LIVE).to_pylist()
        for row in catalog.query(con, "SELECT uri, error_code, error FROM failures").to_pylist():
            found.failed[name_of(row["uri"])] = row["error_code"]
            found.errors[name_of(row["uri"])] = row["error"]
        for row in catalog.query(con, _BY_RUN).to_pylist():
            found.by_run[row["run_id"], row["status"]] = row["n"]
        segments, tokens = (
            {row["write_id"]: row for row in catalog.query(con, _ROWS.format(view)).to_pylist()}
            for view in ("segments", "tokens")
        )
    for key in ("video_id", "write_id", "uri"):
        found.doubled += [value for value, number in Counter(row[key] for row in live).items() if number > 1]
    for row in live:
        name = name_of(row["uri"])
        found.live[name] = row
        if row["num_frames"] != num_frames.get(name, row["num_frames"]):
            found.broken.append(f"{name} has {row['num_frames']} frames, its file {num_frames[name]}")
        for view, rows in (("segments", segments), ("tokens", tokens)):
            _check_rows(found, f"{view} of {name}", rows.pop(row["write_id"], None), row["num_segments"])
    found.broken += [f"rows of nobody: {write_id}" for rows in (segments, tokens) for write_id in rows]


def _check_rows(found: Findings, what: str, rows: dict[str, Any] | None, num_segments: int) -> None:
    if rows is None or rows["num_distinct"] < num_segments:
        found.lost.append(what)
    elif rows["n"] > num_segments:
        found.doubled.append(what)


def _check_tokens(found: Findings, snapshot: Snapshot) -> None:
    """Read the tokens of every live video as answering does; their blobs check their own shapes."""
    names = {row["write_id"]: name for name, row in found.live.items()}
    videos = by_video(read_tokens(snapshot, names))
    for write_id, rows in videos.items():
        from_arrow(rows)
        found.tokens[names[write_id]] = _digest(rows)
        if len(rows) != found.live[names[write_id]]["num_segments"]:
            found.broken.append(f"{names[write_id]} has {len(rows)} segments of tokens")
    found.lost += [name for write_id, name in names.items() if write_id not in videos]


def _digest(rows: pa.Table) -> str:
    """A digest of all that a video's rows of tables.TOKENS hold besides its ids."""
    digest = hashlib.sha256()
    for blob in (value for name in ("local", "sizes", "spans", "cls") for value in rows[name].to_pylist()):
        digest.update(blob or b"")
    return digest.hexdigest()


def _check_bytes(found: Findings, snapshot: Snapshot) -> None:
    """All that `maintain --verify` looks at: no file is gone or damaged, and no live video lacks a segment."""
    verified = verify(snapshot)
    found.broken += [f"{uri}: {why}" for uri, why in verified.damaged_files.items()]
    found.broken += [f"{problem['uri']}: {problem['table']} {problem['problem']}" for problem in verified.problems]


def _check_index_file(store_uri: str) -> None:
    path = Path(store_uri) / "index.duckdb"
    if is_local(store_uri) and path.exists():
        with duckdb.connect(str(path), read_only=True) as con:
            con.execute("SELECT count(*) FROM videos").fetchall()
