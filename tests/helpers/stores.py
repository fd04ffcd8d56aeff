"""Stores of made-up videos: encoded units with random blobs, and what a driver would write of them.

Processes of writers import this file, so torch, which takes them longest, is imported where it is needed.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import write_shards
from longvlm.schemas import recipe, tables
from longvlm.schemas.identity import new_write_id, video_id

DIM, KEPT, LAYERS, WIDTH = 64, 8, 2, 16
TOWER = recipe.TowerSpec("made-up", "feed", 4, (4, 4), DIM, 32, has_cls=True, search_dim=WIDTH)
LONG, TINY = recipe.long(TOWER), recipe.tiny(TOWER)


def uri_of(name: str) -> str:
    return f"/videos/{name}.mp4"


def segment(index: int, random: np.random.Generator, *, embedded=True, num_tokens: int = KEPT) -> dict:
    vector = random.normal(size=WIDTH)
    return {
        "segment": index,
        "start_s": index * 10.0,
        "end_s": index * 10.0 + 10,
        "first_frame": index * 100,
        "last_frame": index * 100 + 99,
        "num_frames": 10,
        "embedding": (vector / np.linalg.norm(vector)).astype(np.float32).tolist() if embedded else None,
        "thumbnail": None,
        "num_tokens": num_tokens,
        "dim": DIM,
        "dtype": "float16",
        "local": random.normal(size=(num_tokens, DIM)).astype("<f2").tobytes(),
        "sizes": random.integers(1, 9, num_tokens).astype("<u2").tobytes(),
        "spans": random.integers(0, 99, (num_tokens, 2)).astype("<u4").tobytes(),
        "cls": random.normal(size=(LAYERS, DIM)).astype("<f2").tobytes(),
    }


def unit(name: str, write_id: str, index: int = 0, num_units: int = 1, segments: list[dict] | None = None) -> dict:
    """A unit of `tables.ENCODED`; without segments it is one that failed."""
    good = {
        "duration_s": 40.0, "fps": 10.0, "width": 64, "height": 48, "num_frames": 400, "codec": "h264",
        "decoder": "pyav", "num_segments": len(segments or []) * num_units,
    }  # fmt: skip
    bad = {"error_code": "truncated", "error": "the file ends early"}
    return {
        "video_id": video_id(uri_of(name)),
        "write_id": write_id,
        "unit": index,
        "num_units": num_units,
        **(good if segments else bad),
        "decode_ms": 5.0,
        "encode_ms": 7.0,
        "segments": segments or [],
    }


def encoded(names: list[str], num_segments: int = 4, seed: int = 0, **options) -> pa.Table:
    """One good unit a name, with write ids in the order of the names."""
    random = np.random.default_rng(seed)
    write_ids = sorted(new_write_id() for _ in names)  # those of one millisecond come in any order
    units = [
        unit(name, write_id, segments=[segment(i, random, **options) for i in range(num_segments)])
        for name, write_id in zip(names, write_ids, strict=True)
    ]
    return pa.Table.from_pylist(units, tables.ENCODED)


def videos(outcomes: pa.Table, names: list[str], fingerprint: str, **columns) -> pa.Table:
    """The ledger rows a driver would write of outcomes, a unit a video."""
    rows = []
    for name, outcome in zip(names, outcomes.to_pylist(), strict=True):
        failed = outcome["error_code"] is not None
        row = {key: value for key, value in outcome.items() if key in tables.VIDEOS.names}
        row |= {"uri": uri_of(name), "source": "/videos", "external_id": f"x-{name}", "etag": "1", "size_bytes": 9}
        row |= {"recipe": fingerprint, "status": "failed" if failed else "indexed", "attempts": 1, "run_id": "run"}
        rows.append({**row, **columns})
    return pa.Table.from_pylist(rows, tables.VIDEOS)


def deleted(names: list[str], fingerprint: str | None = None) -> pa.Table:
    rows = [
        {"video_id": video_id(uri_of(n)), "uri": uri_of(n), "recipe": fingerprint, "status": "deleted"} for n in names
    ]
    return pa.Table.from_pylist(rows, tables.VIDEOS)


def index(store: Store, names: list[str], under: recipe.IndexRecipe = LONG, seed: int = 0, **columns) -> pa.Table:
    """Make videos live, as a run would; returns what was encoded."""
    made = encoded(names, seed=seed)
    outcomes = write_shards(store.uri, made, under.fingerprint)
    store.commit(outcomes, videos(outcomes, names, under.fingerprint, **columns))
    return made


def newest(store: Store) -> pa.Table:
    """The newest row of each video and recipe, whatever its status."""
    with catalog.connect(store.pin(("videos",)), ("newest_rows",)) as con:
        return con.sql("FROM newest_rows WHERE recipe IS NOT NULL").to_arrow_table()


def rows(store: Store | str | Path, sql: str) -> list[dict]:
    """What a query finds, over the tables and views that it speaks of and what says what is live: all take longer."""
    opened = store if isinstance(store, Store) else Store.open(str(store))
    words = f"videos recipes {sql.replace('scores', 'verdicts')}"
    needed = ["runs"] if "FROM runs" in sql else [name for name in tables.TABLES if name in words]
    views = None if "answers_wide" in sql else re.findall(r"\w+", sql)
    with catalog.connect(opened.pin(needed), views) as con:
        return catalog.query(con, sql).to_pylist()


def move(store: Store, old: str, new: str) -> None:
    """Let a video be live under another name."""
    (row,) = rows(store, f"FROM live_videos WHERE uri = '{uri_of(old)}'")
    moved = {key: value for key, value in row.items() if key in tables.VIDEOS.names}
    moved |= {"video_id": video_id(uri_of(new)), "uri": uri_of(new)}
    gone = {"video_id": row["video_id"], "uri": row["uri"], "status": "deleted"}
    store.append("videos", pa.Table.from_pylist([moved, gone], tables.VIDEOS))


def append(uri: str, prefix: str, log: str, num_commits: str = "10000") -> None:
    """A writer of its own process: commits two videos at a time and notes each commit that succeeded."""
    store = Store.open(uri)
    with Path(log).open("a") as done:
        for number in range(int(num_commits)):
            names = [f"{prefix}-{number}-{i}" for i in range(2)]
            index(store, names, seed=number)
            done.write("\n".join(names) + "\n")
            done.flush()


def create(uri: str, start) -> None:
    """Makes a store in a process of its own, when the others are ready to do so too."""
    start.wait()
    Store.create(uri)


@cache
def token_video(counts: tuple[int, ...], num_global: int = 2, seed: int = 0):
    """VideoTokens whose segments cover ten frames each; frame 10 * i + j is the j-th of segment i."""
    import torch

    from longvlm.pipeline.vision.tokens import VideoTokens

    random = torch.Generator().manual_seed(seed)
    num_tokens = sum(counts)
    firsts = torch.cat([torch.randint(10 * i, 10 * i + 5, (n,), generator=random) for i, n in enumerate(counts)])
    return VideoTokens(
        torch.randn(num_tokens, DIM, generator=random).half(),
        torch.randint(1, 9, (num_tokens,), generator=random),
        torch.stack([firsts, firsts + 4], dim=-1),
        counts,
        (10,) * len(counts),
        torch.randn(num_global, DIM, generator=random),
    )


def segment_of(tokens, index: int):
    """The local tokens of a segment of VideoTokens, their sizes and spans."""
    stop = sum(tokens.counts[: index + 1])
    part = slice(stop - tokens.counts[index], stop)
    return tokens.local[part], tokens.sizes[part], tokens.spans[part]
