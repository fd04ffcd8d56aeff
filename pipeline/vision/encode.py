"""The encode stage of the index job: units of decoded frames to units of stored tokens.

Shape letters: F frames, B pictures (what the tower looks at at once, of a frame or of several), P patches, S segments,
T tokens of a segment, K tokens kept, D channels, G global layers, E search channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from longvlm.pipeline.transfer import Fetch, fetch_beside, tensor_on, to_device
from longvlm.pipeline.vision.blobs import as_tensor, buffers
from longvlm.pipeline.vision.int8 import MAX_INT8
from longvlm.pipeline.vision.merge import MergeMetric, merge
from longvlm.pipeline.vision.pictures import SegmentPictures, distinct_numbers, distinct_pictures, still_frames
from longvlm.pipeline.vision.tokens import SegmentTokens
from longvlm.pipeline.vision.towers.contract import Encoded, Tower
from longvlm.schemas.errors import ErrorCode
from longvlm.schemas.recipe import IndexRecipe, TokenDtype
from longvlm.schemas.tables import ENCODED

# Frames encoded and merged together, in whole units. On a GPU two forward passes of the tower: enough to keep it full
# (0.13 GB of bfloat16 patches of ViT-L/14, 0.27 GB more while they are merged in float32), and few enough for a call of
# eight units of 100 frames to be several batches, of which only the first is gathered and only the last turned into
# rows while the GPU has nothing to do. A CPU gains nothing from more than one unit.
FRAMES_PER_BATCH = {"cpu": 100, "cuda": 256}
# Batches that are launched before an earlier one's results are waited for. One is enough for a GPU to find work queued
# whenever it is done with a batch. A CPU has computed a batch when it has launched it.
BATCHES_AHEAD = {"cpu": 0, "cuda": 1}

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class MergedSegment:
    """A merged segment on the CPU: what is kept of it, in float32 and not checked yet."""

    local: Tensor  # [K, D]
    sizes: Tensor  # [K]
    spans: Tensor  # [K, 2], frame numbers
    positions: Tensor | None = None  # [K, 3], seconds into the video, row and column
    cls: Tensor | None = None  # [G, D]
    embedding: Tensor | None = None  # [E]
    frame_embeddings: Tensor | None = None  # [B, E] int8; a tower with a text encoder sees frames one by one


@dataclass(frozen=True, eq=False)
class _Group:
    """Segments with equally many frames, merged, on their way to the host."""

    members: list[int]  # S: which of all segments
    fields: tuple[str, ...]  # of MergedSegment
    fetch: Fetch  # a tensor [S, ...] for each field


@dataclass(frozen=True, eq=False)
class _Flight:
    """A batch that was given to the device, and what will come back."""

    batch: list[int]  # which of all units
    launched_at: float
    groups: list[_Group]


def encode_units(frames: pa.Table, tower: Tower, recipe: IndexRecipe) -> pa.Table:
    """Encode and merge the units of a batch (longvlm.schemas.tables.FRAMES -> ENCODED), row for row.

    A unit that arrives with an error code passes through. One whose tokens cannot be stored (a tower in float16 that
    overflowed, say) gets the code `encode_failed` and a sentence; the others are not touched by that.

    On a GPU the host gathers a batch and makes rows of the one before while the device computes (`BATCHES_AHEAD`). It
    waits for the device in one place, where it needs a batch's merged tokens.
    """
    units = [{**unit, "encode_ms": 0.0} for unit in frames.drop_columns(["frames"]).to_pylist()]
    pixels: dict[int, Tensor] = {}
    for i, (unit, blob) in enumerate(zip(units, buffers(frames["frames"]), strict=True)):
        if unit["error_code"] is None:
            try:
                pixels[i] = _pixels(unit, blob)
            except ValueError as error:
                units[i] = _failed(unit, str(error))
    clock = time.process_time if tower.device.type == "cpu" else time.perf_counter
    flights = (
        _Flight(batch, clock(), _launch([units[i] for i in batch], [pixels[i] for i in batch], tower, recipe))
        for batch in _batches(units, pixels, FRAMES_PER_BATCH[tower.device.type])
    )
    collected_at = clock()
    for flight in _pipelined(flights, BATCHES_AHEAD[tower.device.type]):
        merged = iter(_collect(flight.groups))
        for i in flight.batch:
            units[i] = _finished(units[i], [(segment, next(merged)) for segment in units[i]["segments"]], recipe.dtype)
        # one batch is computed after another, so this one has had the device since the one before was done
        start, collected_at = max(collected_at, flight.launched_at), clock()
        ms_per_frame = (collected_at - start) * 1e3 / sum(len(pixels[i]) for i in flight.batch)
        for i in flight.batch:
            units[i]["encode_ms"] = ms_per_frame * len(pixels[i])
    return pa.Table.from_pylist(units, schema=ENCODED)


def _pipelined(flights: Iterator[_Flight], ahead: int) -> Iterator[_Flight]:
    """The flights in order, each when `ahead` later ones are launched, as far as there are any."""
    in_the_air: deque[_Flight] = deque()
    for flight in flights:
        in_the_air.append(flight)
        if len(in_the_air) > ahead:
            yield in_the_air.popleft()
    yield from in_the_air


def _launch(units: list[Row], pixels: list[Tensor], tower: Tower, recipe: IndexRecipe) -> list[_Group]:
    """Give a batch to the device: frames sent, encoded and merged, results on their way back; waits for none of it.

    Frames and patches are let go of here. Torch reuses pinned memory only once it is copied, and device memory only for
    work that is queued after this, so that the patches of two batches never take up memory at the same time.
    """
    shown = [
        [SegmentPictures.of(one["frames"], one["times_s"], recipe.tower.frames_per_picture) for one in unit["segments"]]
        for unit in units
    ]
    numbers = [distinct_numbers(unit["segments"]) for unit in units]
    chosen, places = distinct_pictures(shown, list(map(still_frames, numbers, pixels)))
    parts = [
        part if taken == there else part[np.searchsorted(there, taken)]
        for part, there, taken in zip(pixels, numbers, chosen, strict=True)
    ]
    encoded = tower.encode(_together(parts, tower.device), recipe.feature_layer, recipe.num_global_layers)
    return _merge_groups(encoded, places, [segment for unit in shown for segment in unit], recipe)


def merge_segments(encoded: Encoded, segments: Sequence[SegmentPictures], recipe: IndexRecipe) -> list[MergedSegment]:
    """Cut encoded pictures into segments and merge each; all with the same number of pictures in one call.

    Global tokens and embeddings are means over a segment's pictures, the embedding L2-normalised again.

    Args:
        encoded: of all pictures of all segments, in order.
        segments: what these show.
        recipe: how far to merge. A segment that has fewer tokens than the recipe keeps stays as it is.
    """
    starts = accumulate((len(segment.numbers) for segment in segments), initial=0)
    places = [range(start, start + len(segment.numbers)) for start, segment in zip(starts, segments, strict=False)]
    return _collect(_merge_groups(encoded, places, segments, recipe))


def _merge_groups(
    encoded: Encoded, places: Sequence[Sequence[int]], segments: Sequence[SegmentPictures], recipe: IndexRecipe
) -> list[_Group]:
    """The first half of `merge_segments`, up to where the host would have to wait for the device.

    `places` says for each segment which of the encoded pictures are its own; the same one may stand in several places.
    """
    device = encoded.patches.device
    kinds = [(len(one.numbers), recipe.most_tokens(len(set(one.numbers)))) for one in segments]
    groups = []
    for kind in set(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        chosen = [places[i] for i in members]
        # without a copy where the segments are all there is, each picture once
        all_there_is = [place for pictures in chosen for place in pictures] == list(range(len(encoded.patches)))
        places_SB = None if all_there_is else tensor_on(device, chosen)
        parts = _merge_group(encoded, places_SB, [segments[i] for i in members], recipe, kind[1])
        groups.append(_Group(members, tuple(parts), fetch_beside(*parts.values())))
    return groups


def _merge_group(
    encoded: Encoded,
    places_SB: Tensor | None,
    segments: Sequence[SegmentPictures],
    recipe: IndexRecipe,
    most_tokens: int,
) -> dict[str, Tensor]:
    """The fields of MergedSegment for S segments with equally many pictures, [S, ...] each, on the device.

    Where a segment shows a picture twice, its patches stand there twice, so that sizes and schedule are those of any
    other segment (LONGVLM.md, section 4).
    """
    device, num_patches = encoded.patches.device, encoded.patches.shape[1]
    spans_SB2 = tensor_on(device, [[(numbers[0], numbers[-1]) for numbers in one.numbers] for one in segments])

    def at(pictures: Tensor) -> Tensor:
        """Encoded pictures [B, ...] by segment, [S, B of each, ...]."""
        return pictures.view(*spans_SB2.shape[:2], *pictures.shape[1:]) if places_SB is None else pictures[places_SB]

    patches_STD = at(encoded.patches).flatten(1, 2)
    merged = merge(
        patches_STD,
        recipe.schedule_for(patches_STD.shape[1], most_tokens),
        spans=spans_SB2[:, :, None].expand(-1, -1, num_patches, -1).flatten(1, 2),
        positions=_positions(segments, recipe, device) if recipe.tower.has_positions else None,
        metric=MergeMetric(num_channels=recipe.tower.metric_dim),
    )
    parts = {"local": merged.tokens, "sizes": merged.sizes, "spans": merged.spans}
    if merged.positions is not None:
        parts["positions"] = merged.positions
    if encoded.cls is not None:
        parts["cls"] = at(encoded.cls).float().mean(dim=1)
    if encoded.embedding is not None:
        embedding_SBE = at(encoded.embedding)
        parts["embedding"] = normalize(embedding_SBE.mean(dim=1), dim=-1)
        parts["frame_embeddings"] = _as_int8(embedding_SBE)
    return parts


def _as_int8(embedding_SBE: Tensor) -> Tensor:
    """Embeddings as int8, each as long as fits: only which way one points is asked for, and that they keep."""
    largest_SB1 = embedding_SBE.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (embedding_SBE / largest_SB1 * MAX_INT8).round().to(torch.int8)


def _positions(segments: Sequence[SegmentPictures], recipe: IndexRecipe, device: torch.device) -> Tensor:
    """Where patch tokens lie before merging, [S, T, 3]: seconds into the video, row and column of the grid."""
    rows, columns = recipe.tower.patch_grid
    times_SB = torch.tensor([one.times_s for one in segments], dtype=torch.float64)
    axes = (torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64))
    grid_P2 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    shape = (*times_SB.shape, len(grid_P2))
    positions = torch.cat([times_SB[..., None, None].expand(*shape, 1), grid_P2.expand(*shape, 2)], dim=-1)
    return to_device(positions.flatten(1, 2), device)


def _collect(groups: list[_Group]) -> list[MergedSegment]:
    """The segments of all groups in order. Here the host waits for the device, and nowhere else."""
    result: dict[int, MergedSegment] = {}
    for group in groups:
        parts = dict(zip(group.fields, group.fetch.wait(), strict=True))
        for row, member in enumerate(group.members):
            result[member] = MergedSegment(**{field: part[row] for field, part in parts.items()})
    return [result[i] for i in range(len(result))]


def _pixels(unit: Row, blob: pa.Buffer | None) -> Tensor:
    """A unit's frames, uint8 [F, height, width, 3], where they lie in the Arrow table.

    Raises:
        ValueError: there are not as many bytes as the unit's segments ask for.
    """
    height, width = unit["frame_height"], unit["frame_width"]
    num_frames = len(distinct_numbers(unit["segments"]))
    if blob is None or not height or not width:
        raise ValueError("it came without frames")
    return as_tensor(blob, pa.uint8(), (num_frames, height, width, 3))


def _batches(units: list[Row], pixels: dict[int, Tensor], max_frames: int) -> Iterator[list[int]]:
    """Consecutive units with frames of one size, that show up to `max_frames` in all, but one unit at least.

    Repeats count: patches are gathered for each before they are merged.
    """
    batch: list[int] = []
    room = max_frames
    for i, frames in pixels.items():
        num_shown = sum(len(segment["frames"]) for segment in units[i]["segments"])
        if batch and (num_shown > room or frames.shape[1:] != pixels[batch[0]].shape[1:]):
            yield batch
            batch, room = [], max_frames
        batch.append(i)
        room -= num_shown
    if batch:
        yield batch


def _together(parts: list[Tensor], device: torch.device) -> Tensor:
    """The frames of several units in one tensor; for a GPU in pinned memory, from where copies need no waiting."""
    if len(parts) == 1 and device.type == "cpu":
        return parts[0]
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    together = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return torch.cat(parts, out=together)


def _finished(unit: Row, merged: list[tuple[Row, MergedSegment]], dtype: TokenDtype) -> Row:
    """A unit with its segments as stored, or failed because one of them cannot be stored."""
    try:
        return {**unit, "segments": [_stored(segment, tokens, dtype) for segment, tokens in merged]}
    except (ValueError, OverflowError) as error:
        return _failed(unit, f"{error}; a recipe with precision float32 may index it")


def _stored(segment: Row, merged: MergedSegment, dtype: TokenDtype) -> Row:
    frames = segment["frames"]
    tokens = SegmentTokens(
        segment["segment"], len(frames), merged.local, merged.sizes, merged.spans, merged.cls, merged.positions
    )
    if merged.embedding is not None and not merged.embedding.isfinite().all():
        raise ValueError(f"the search embedding of segment {segment['segment']} is not finite")
    distinct = {number: place for place, number in reversed(list(enumerate(frames)))}  # those shown twice, once
    places = [distinct[number] for number in sorted(distinct)]
    of_frames = merged.frame_embeddings
    return {
        **tokens.to_row(dtype),
        "start_s": segment["start_s"],
        "end_s": segment["end_s"],
        "first_frame": frames[0],
        "last_frame": frames[-1],
        "thumbnail": segment["thumbnail"],
        "embedding": None if merged.embedding is None else merged.embedding.numpy(),
        "frames": [frames[place] for place in places],
        "times_s": [segment["times_s"][place] for place in places],
        "frame_embeddings": None if of_frames is None else of_frames[places].numpy().tobytes(),
    }


def _failed(unit: Row, reason: str) -> Row:
    error = f"unit {unit['unit']} of the video could not be encoded: {reason}."
    return {**unit, "segments": [], "error_code": ErrorCode.ENCODE_FAILED, "error": error}
