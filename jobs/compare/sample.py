"""A sample of a source's videos, watched in this process: tokens as an index would store them, and some frames."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longvlm.jobs.cluster.executor import Stage, run_inprocess
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.index.stages import Watch
from longvlm.jobs.names import match_questions
from longvlm.pipeline.vision.blobs import as_tensor, buffers
from longvlm.pipeline.vision.encode import encode_units
from longvlm.pipeline.vision.pictures import SegmentPictures, distinct_numbers
from longvlm.pipeline.vision.tokens import VideoTokens, from_arrow
from longvlm.pipeline.vision.towers.contract import Tower
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.identity import new_write_id
from longvlm.schemas.recipe import IndexRecipe

Drawn = tuple[dict[str, Any], list[int]]  # a row of tables.LISTING, and the rows of its questions
_ABOUT = "FROM given LEFT JOIN named ON video = name WHERE video IS NULL OR n = {n} ORDER BY q"
_ELSEWHERE = "SELECT count(*) FROM given WHERE video IS NOT NULL AND video NOT IN (SELECT name FROM named)"


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
        con.register("named", match_questions(con, "given", "live"))
        ((num_elsewhere,),) = con.execute(_ELSEWHERE).fetchall()
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
    """A video's tokens as stored, and some of its pictures, evenly chosen, with all of their patches as stored."""

    tokens: VideoTokens
    segments: list[dict[str, Any]]  # start_s, end_s and first_frame of each
    frames: Tensor  # uint8 [F, height, width, 3], picture by picture; F is 0 where none were asked for
    whole: VideoTokens | None  # nothing merged, no global tokens; None without frames


def watch_sample(
    videos: Iterable[dict[str, Any]], recipe: IndexRecipe, tower: Tower, most_pictures: int
) -> Iterator[Watched | TerminalError]:
    """Decode, encode and merge some videos, each decoded once, by the index job's own operators.

    Args:
        videos: rows of tables.LISTING.
        recipe: what is kept of a video.
        tower: the recipe's.
        most_pictures: how many pictures of a video are handed on with its tokens.

    Yields:
        Each video in turn; of one that failed, the error that its row in the store would have.
    """
    planned = (video | {"write_id": new_write_id(), "attempts": 1} for video in videos)
    plans = (pa.Table.from_pylist([row], schema=tables.PLAN) for row in planned)
    units = run_inprocess(plans, [Stage(Watch, (recipe.spec(), Tally()), None, workers=1, cpus=1.0)])
    for _, of_one in groupby(units, key=lambda unit: unit["write_id"][0].as_py()):
        yield _watched(of_one, recipe, tower, most_pictures)


def _watched(
    units: Iterator[pa.Table], recipe: IndexRecipe, tower: Tower, most_pictures: int
) -> Watched | TerminalError:
    """One video of its units, rows of tables.FRAMES."""
    per_picture, patches = recipe.tower.frames_per_picture, recipe.tower.num_patches
    unmerged = replace(
        recipe, frames_per_segment=per_picture, tokens_per_segment=patches, merge_schedule=None, num_global_layers=0
    )
    stored: list[dict[str, Any]] = []
    whole: list[dict[str, Any]] = []
    frames: list[Tensor] = []
    chosen: Sequence[int] = ()
    num_before = 0
    for unit in units:
        (about,) = unit.drop_columns(["frames"]).to_pylist()
        (encoded,) = encode_units(unit, tower, recipe).to_pylist()
        if encoded["error_code"] is not None:
            return TerminalError(ErrorCode(encoded["error_code"]), encoded["error"])
        stored += encoded["segments"]
        chosen = chosen or _choose(about["num_pictures"], most_pictures)
        pictures, numbers = _pictures(about["segments"], per_picture), distinct_numbers(about["segments"])
        here = [pictures[place - num_before] for place in chosen if 0 <= place - num_before < len(pictures)]
        pixels = _pixels(unit, about)
        frames.append(pixels[np.searchsorted(numbers, [number for picture in here for number in picture["frames"]])])
        if here:
            shown = pixels[np.searchsorted(numbers, distinct_numbers(here))]
            alone = _pictures_alone(about, here, shown, first=len(whole))
            whole += encode_units(alone, tower, unmerged).to_pylist()[0]["segments"]
        num_before += len(pictures)
    segments = [{name: segment[name] for name in ("start_s", "end_s", "first_frame")} for segment in stored]
    return Watched(_read_back(stored), segments, torch.cat(frames), _read_back(whole) if whole else None)


def _choose(total: int, most_pictures: int) -> Sequence[int]:
    """Which of a video's pictures to hand on: the middles of equal parts."""
    number = min(total, most_pictures)
    return [(2 * i + 1) * total // (2 * number) for i in range(number)]


def _pictures(segments: list[dict[str, Any]], per_picture: int) -> list[dict[str, Any]]:
    """The pictures of a unit's segments, each as a segment of its own."""
    found: list[dict[str, Any]] = []
    for segment in segments:
        frames, times_s = segment["frames"], segment["times_s"]
        for picture in SegmentPictures.of(frames, times_s, per_picture).places:
            shown = {"frames": [frames[i] for i in picture], "times_s": [times_s[i] for i in picture]}
            found.append(segment | shown)
    return found


def _pixels(unit: pa.Table, about: dict[str, Any]) -> Tensor:
    """A unit's frames, uint8 [F, height, width, 3], where they lie in the Arrow table."""
    (blob,) = buffers(unit["frames"])
    assert blob is not None
    return as_tensor(blob, pa.uint8(), (-1, about["frame_height"], about["frame_width"], 3))


def _pictures_alone(about: dict[str, Any], pictures: list[dict[str, Any]], frames: Tensor, *, first: int) -> pa.Table:
    """Some pictures of a unit as tables.FRAMES, each as a segment of its own, the first with the number `first`."""
    segments = [{**picture, "segment": first + i} for i, picture in enumerate(pictures)]
    row = about | {"segments": segments, "frames": frames.numpy().tobytes()}
    return pa.Table.from_pylist([row], schema=tables.FRAMES)


def _read_back(segments: list[dict[str, Any]]) -> VideoTokens:
    return from_arrow(pa.Table.from_pylist(segments, schema=tables.TOKENS))
