"""A few videos of a source, watched in this process: their tokens as an index would store them, and some frames."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longvlm.jobs.cluster.resources import DECODE_DEADLINE_S, DECODE_MEMORY_BYTES
from longvlm.jobs.names import resolve
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import plan_segments
from longvlm.pipeline.decode.units import decode_units
from longvlm.pipeline.vision.blobs import as_tensor, buffers
from longvlm.pipeline.vision.encode import merge_segments
from longvlm.pipeline.vision.tokens import SegmentTokens, VideoTokens, from_arrow
from longvlm.pipeline.vision.tower import Encoded, Tower
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.timeline import VideoInfo

Drawn = tuple[dict[str, Any], list[int]]  # a row of tables.LISTING, and the rows of its questions
_ABOUT = "FROM given LEFT JOIN named ON video = name WHERE video IS NULL OR n = {n} ORDER BY q"


def draw(listing: pa.Table, questions: pa.Table, number: int, seed: int) -> tuple[list[Drawn], int]:
    """Some videos at random, out of those that the questions are about, each with the rows of its questions.

    Also returns how many questions name videos that the listing lacks: nobody asks those.

    Args:
        listing: tables.LISTING.
        questions: tables.QUESTIONS.
        number: how many videos, if there are as many.
        seed: equal seeds draw equal videos.

    Raises:
        InputError: no question is about any of the videos, or a name could mean several.
    """
    with duckdb.connect() as con:
        con.register("live", listing.append_column("n", pa.array(np.arange(len(listing)))))
        con.register("given", questions.append_column("q", pa.array(np.arange(len(questions)))))
        # `resolve` takes a name that nobody knows for a mistake, unless the ledger knows it
        con.execute("CREATE TEMP VIEW ledger_videos AS SELECT video AS uri, NULL AS external_id FROM given")
        num_elsewhere = resolve(con)
        every = "SELECT n FROM live WHERE EXISTS (FROM given WHERE video IS NULL) OR n IN (SELECT n FROM named)"
        asked = [n for (n,) in con.execute(f"{every} ORDER BY n").fetchall()]
        if not asked:
            raise InputError(
                "none of the questions is about a video of the source; name its videos in the column video by uri, "
                "path or file name, or leave the column out to ask about all."
            )
        drawn = np.random.default_rng(seed).choice(asked, min(number, len(asked)), replace=False)
        rows = {n: [q for (q,) in con.execute(f"SELECT q {_ABOUT.format(n=n)}").fetchall()] for n in sorted(drawn)}
    videos = listing.take(pa.array(list(rows), pa.int64())).to_pylist()
    return list(zip(videos, rows.values(), strict=True)), num_elsewhere


@dataclass(frozen=True, eq=False)
class Watched:
    """A video's tokens as stored, and some of its frames, evenly chosen, with all of their patches as stored."""

    tokens: VideoTokens
    segments: list[dict[str, Any]]  # start_s and first_frame of each
    frames: Tensor  # uint8 [F, px, px, 3]; F is 0 where none were asked for
    whole: VideoTokens | None  # nothing merged, no global tokens; None without frames


class Watcher:
    """Watches one video after the other, each decoded once, as the index job does. Close it at the end.

    Args:
        recipe: what is kept of a video.
        tower: the recipe's.
        most_frames: how many frames are handed on with the tokens.
    """

    def __init__(self, recipe: IndexRecipe, tower: Tower, most_frames: int) -> None:
        self.recipe, self.tower, self.most_frames = recipe, tower, most_frames
        num_patches = recipe.tower.num_patches
        self._untouched = replace(
            recipe, frames_per_segment=1, tokens_per_segment=num_patches, merge_schedule=None, num_global_layers=0
        )
        with ExitStack() as stack:
            self._decoder = stack.enter_context(Decoder(DECODE_DEADLINE_S, DECODE_MEMORY_BYTES))
            self._scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="longvlm-"))
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def watch(self, video: dict[str, Any]) -> Watched:
        """Decode, encode and merge one video, a row of tables.LISTING.

        Raises:
            TerminalError: with the code that its row in the store would have.
        """
        kept: list[dict[str, Any]] = []
        whole: list[dict[str, Any]] = []
        segments: list[dict[str, Any]] = []
        frames: list[Tensor] = []
        chosen: Sequence[int] = ()
        num_before = 0
        write = {"video_id": video["video_id"], "write_id": new_write_id(), "recipe": self.recipe.fingerprint}
        for unit in decode_units({**video, **write}, self.recipe, self._decoder, self._scratch):
            (about,) = unit.drop_columns(["frames"]).to_pylist()
            if about["error_code"] is not None:
                raise TerminalError(ErrorCode(about["error_code"]), about["error"])
            numbers = [segment["frames"] for segment in about["segments"]]
            segments += [{"start_s": one["start_s"], "first_frame": one["frames"][0]} for one in about["segments"]]
            pixels = _pixels(unit, about["frame_px"])
            chosen = chosen or self._choose(about)
            here = [i - num_before for i in chosen if num_before <= i < num_before + len(pixels)]
            encoded = self.tower.encode(pixels, self.recipe.feature_layer, self.recipe.num_global_layers)
            kept += _rows(encoded, numbers, self.recipe, write, first=len(kept))
            frames.append(pixels[here])
            if here:
                flat = [number for segment in numbers for number in segment]
                part = Encoded(encoded.patches[here], None, None)
                whole += _rows(part, [[flat[i]] for i in here], self._untouched, write, first=len(whole))
            num_before += len(pixels)
        return Watched(_read_back(kept), segments, torch.cat(frames), _read_back(whole) if whole else None)

    def _choose(self, about: dict[str, Any]) -> Sequence[int]:
        """Which of the recipe's frames to hand on: the middles of equal parts."""
        info = VideoInfo(**{field.name: about[field.name] for field in fields(VideoInfo)})
        total = sum(segment.num_frames for segment in plan_segments(self.recipe, info))
        number = min(total, self.most_frames)
        return [(2 * i + 1) * total // (2 * number) for i in range(number)]


def _pixels(unit: pa.Table, side: int) -> Tensor:
    """A unit's frames, uint8 [F, px, px, 3], where they lie in the Arrow table."""
    (blob,) = buffers(unit["frames"])
    assert blob is not None
    return as_tensor(blob, pa.uint8(), (-1, side, side, 3))


def _rows(
    encoded: Encoded, numbers: list[list[int]], recipe: IndexRecipe, write: dict[str, Any], *, first: int
) -> list[dict[str, Any]]:
    """Rows of tables.TOKENS of some consecutive segments, by the frame numbers of each."""
    merged = merge_segments(encoded, numbers, recipe)
    try:
        return [
            SegmentTokens(first + i, len(numbers[i]), one.local, one.sizes, one.spans, one.cls).to_row() | write
            for i, one in enumerate(merged)
        ]
    except (ValueError, OverflowError) as error:
        raise TerminalError(ErrorCode.ENCODE_FAILED, f"the video could not be encoded: {error}.") from error


def _read_back(rows: list[dict[str, Any]]) -> VideoTokens:
    return from_arrow(pa.Table.from_pylist(rows, schema=tables.TOKENS))
