"""The plan of a training run: its examples and their order, made by the driver in DuckDB and Arrow, always the same.

The plan is a list of steps, each a batch of videos with all their conversations. It follows from the recipe's seed
alone, so that a resumed run simply begins the list later.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa

from longvlm.jobs.names import match_questions
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import CONVERSATIONS, TrainRecipe

_CONVERSATION = pa.struct([CONVERSATIONS.field(name) for name in ("id", "turns", "at_s")])
PLANNED = pa.schema(  # a planned example: a video and its conversations, in the step that trains on them
    [("step", pa.int64()), ("write_id", pa.string()), ("uri", pa.string()), ("conversations", pa.list_(_CONVERSATION))]
)
MIN_BLOCK_VIDEOS = 32  # read by one task: a shard's footer serves several videos

_LIVE = """
CREATE TEMP TABLE live AS
SELECT row_number() OVER (ORDER BY write_id)::INTEGER AS n, video_id, uri, external_id, write_id
FROM live_videos WHERE recipe = $1
"""
_GIVEN = """
CREATE TEMP TABLE given AS
SELECT c.q, c.id, c.turns, c.at_s, c.turns[1].question AS question,
    coalesce(live.uri, c.video) AS video, c.video AS said
FROM conversations c LEFT JOIN live ON c.video = live.video_id
"""
_VIDEOS = """
SELECT write_id, uri, list({'id': id, 'turns': turns, 'at_s': at_s} ORDER BY q) AS conversations
FROM given JOIN named ON video = name JOIN live USING (n) GROUP BY n, write_id, uri ORDER BY n
"""
_MISSING = "SELECT count(*), coalesce(min(said), '') FROM given WHERE video NOT IN (SELECT name FROM named)"


@dataclass(frozen=True)
class TrainPlan:
    """The plan of a training run: its videos with their conversations, and what could not be used."""

    videos: pa.Table  # write_id, uri, conversations; a row a video
    num_missing: int = 0  # conversations about videos that are not live in the store
    first_missing: str = ""
    versions: dict[str, int] = field(default_factory=dict)  # of the store's tables

    @property
    def num_conversations(self) -> int:
        """Conversations of all videos."""
        return sum(map(len, self.videos["conversations"].to_pylist()))

    @property
    def fingerprint(self) -> str:
        """A hash of the data; changes with any word, any video, and any version of a video's tokens."""
        digest = hashlib.sha256()
        for batch in self.videos.to_batches(max_chunksize=1000):
            for row in batch.select(["write_id", "conversations"]).to_pylist():
                digest.update(json.dumps(row, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def steps(self, recipe: TrainRecipe) -> Iterator[list[int]]:
        """Videos of each step, by their place: every epoch in another order."""
        done, num_steps = 0, recipe.num_steps(len(self.videos))
        for epoch in range(recipe.epochs):
            order = np.random.default_rng((recipe.seed, epoch)).permutation(len(self.videos)).tolist()
            for start in range(0, len(order), recipe.batch_videos):
                if done == num_steps:
                    return
                yield order[start : start + recipe.batch_videos]
                done += 1

    def blocks(self, recipe: TrainRecipe, worker: int, num_workers: int, first: int) -> list[pa.Table]:
        """What one worker trains on, as PLANNED from step `first` on (0 is the first), some steps a block.

        A step's videos are dealt out one by one; a worker may have none in a step.
        """
        rows = [
            (step, place)
            for step, places in enumerate(self.steps(recipe))
            if step >= first
            for place in places[worker::num_workers]
        ]
        if not rows:
            return [PLANNED.empty_table()]
        steps, places = (pa.array(column, pa.int64()) for column in zip(*rows, strict=True))
        planned = self.videos.take(places).append_column("step", steps).select(PLANNED.names).cast(PLANNED)
        numbers = steps.to_numpy()
        steps_per_block = max(1, MIN_BLOCK_VIDEOS * num_workers // recipe.batch_videos)
        starts = np.flatnonzero(np.diff(numbers // steps_per_block, prepend=-1)).tolist()
        ends = [*starts[1:], len(numbers)]
        return [planned.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def plan_training(snapshot: Snapshot, conversations: pa.Table, index_recipe: str) -> TrainPlan:
    """Plan a run: join conversations with the live videos that they are about.

    Args:
        snapshot: from `Store.pin`.
        conversations: CONVERSATIONS.
        index_recipe: fingerprint of the tokens to train on.

    Raises:
        InputError: none is about a video that is live, or a name could mean several.
    """
    read = Snapshot({name: table for name, table in snapshot.tables.items() if name == "videos"})
    with catalog.connect(read, apart=True) as con:
        access.seal(con, read)
        videos, missing, first = _join(con, conversations, index_recipe)
    if not len(videos):
        raise InputError(
            f"none of the {len(conversations)} conversations is about a video that is indexed for this model: one is "
            f"about {first!r}; name videos as `longvlm sql` shows them in the view videos, or index them first."
        )
    return TrainPlan(videos, missing, first, {name: table.version for name, table in snapshot.tables.items()})


def _join(con: duckdb.DuckDBPyConnection, conversations: pa.Table, index_recipe: str) -> tuple[pa.Table, int, str]:
    numbers = pa.array(np.arange(len(conversations), dtype=np.int32))
    con.register("conversations", conversations.append_column("q", numbers))
    con.execute(_LIVE, [index_recipe])
    con.execute(_GIVEN)
    con.register("named", match_questions(con, "given", "live"))
    ((missing, first),) = con.execute(_MISSING).fetchall()
    return con.sql(_VIDEOS).to_arrow_table(), missing, first


def select_conversations(snapshot: Snapshot, sql: str) -> list[dict[str, str]]:
    """Rows (video_id, q, a) of somebody's own query over the store, which can read nothing else.

    Raises:
        InputError: it is no SELECT, or cannot run.
    """
    with catalog.connect(snapshot, apart=True) as con:
        access.seal(con, snapshot)
        rows: list[dict[str, str]] = catalog.query(con, sql).to_pylist()
    return rows
