"""Units of decoded frames -> units of stored tokens: the encode stage of the index job.

Shape letters: F frames, P patches, S segments, T tokens of a segment, K tokens kept, D channels, G global layers,
E search channels.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.vision.blobs import as_tensor, buffers
from pipeline.vision.encode import Encoded, Tower
from pipeline.vision.merge import merge
from pipeline.vision.tokens import SegmentTokens
from schemas.errors import ErrorCode
from schemas.recipe import IndexRecipe
from schemas.tables import ENCODED

# Frames encoded and merged together, in whole units: eight units of 100 frames keep a GPU full (0.4 GB of bfloat16
# patches of ViT-L/14, 0.8 GB more while they are merged in float32); a CPU gains nothing from more than one.
FRAMES_PER_BATCH = {"cpu": 100, "cuda": 800}

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class MergedSegment:
    """What is kept of a segment, on the CPU, in float32 and not checked yet."""

    local: Tensor  # [K, D]
    sizes: Tensor  # [K]
    spans: Tensor  # [K, 2], frame numbers
    cls: Tensor | None  # [G, D]
    embedding: Tensor | None  # [E]


def encode_units(frames: pa.Table, tower: Tower, recipe: IndexRecipe) -> pa.Table:
    """Encode and merge the units of a batch (schemas.tables.FRAMES -> ENCODED), row for row.

    A unit that arrives with an error code passes through. One whose tokens cannot be stored (a tower in float16 that
    overflowed, say) gets the code `encode_failed` and a sentence; the others are not touched by that.
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
    for batch in _batches(pixels, FRAMES_PER_BATCH[tower.device.type]):
        start = clock()
        segments = [segment for i in batch for segment in units[i]["segments"]]
        together = _together([pixels[i] for i in batch], tower.device)
        encoded = tower.encode(together, recipe.feature_layer, recipe.num_global_layers)
        merged = iter(merge_segments(encoded, [segment["frames"] for segment in segments], recipe))
        for i in batch:
            units[i] = _finished(units[i], [(segment, next(merged)) for segment in units[i]["segments"]])
        ms_per_frame = (clock() - start) * 1e3 / len(encoded.patches)
        for i in batch:
            units[i]["encode_ms"] = ms_per_frame * len(pixels[i])
    return pa.Table.from_pylist(units, schema=ENCODED)


def merge_segments(
    encoded: Encoded, frame_numbers: Sequence[Sequence[int]], recipe: IndexRecipe
) -> list[MergedSegment]:
    """Cut encoded frames into segments and merge each; all segments with the same number of frames in one call.

    Global tokens and embeddings are means over a segment's frames, the embedding L2-normalised again.

    Args:
        encoded: of all frames of all segments, in order.
        frame_numbers: for each segment the numbers of its frames in the video.
        recipe: how far to merge. A segment that has fewer tokens than the recipe keeps stays as it is.
    """
    counts = [len(numbers) for numbers in frame_numbers]
    starts = [0, *accumulate(counts)]
    result: dict[int, MergedSegment] = {}
    for count in set(counts):
        members = [i for i, other in enumerate(counts) if other == count]
        positions_SF = torch.tensor([range(starts[i], starts[i] + count) for i in members])
        numbers_SF = torch.tensor([frame_numbers[i] for i in members], dtype=torch.int64)
        result |= zip(members, _merge_group(encoded, positions_SF, numbers_SF, recipe), strict=True)
    return [result[i] for i in range(len(counts))]


def _merge_group(
    encoded: Encoded, positions_SF: Tensor, numbers_SF: Tensor, recipe: IndexRecipe
) -> list[MergedSegment]:
    num_patches = encoded.patches.shape[1]
    patches_STD = _at(encoded.patches, positions_SF).flatten(1, 2)
    spans_ST = numbers_SF.to(patches_STD.device).repeat_interleave(num_patches, dim=1)
    merged = merge(
        patches_STD,
        recipe.schedule_for(patches_STD.shape[1]),
        spans=torch.stack([spans_ST, spans_ST], dim=-1),
    )
    local, sizes, spans = merged.tokens.cpu(), merged.sizes.cpu(), merged.spans.cpu()
    cls = embedding = None
    if encoded.cls is not None:
        cls = _at(encoded.cls, positions_SF).float().mean(dim=1).cpu()
    if encoded.embedding is not None:
        embedding = normalize(_at(encoded.embedding, positions_SF).mean(dim=1), dim=-1).cpu()
    return [
        MergedSegment(
            local[i], sizes[i], spans[i], None if cls is None else cls[i], None if embedding is None else embedding[i]
        )
        for i in range(len(local))
    ]


def _at(frames: Tensor, positions_SF: Tensor) -> Tensor:
    """Frames [F, ...] by segment, [S, F / S, ...]; without a copy where the segments are all there is."""
    if positions_SF.numel() == len(frames):
        return frames.view(*positions_SF.shape, *frames.shape[1:])
    return frames[positions_SF.to(frames.device)]


def _pixels(unit: Row, blob: pa.Buffer | None) -> Tensor:
    """A unit's frames, uint8 [F, px, px, 3], where they lie in the Arrow table.

    Raises:
        ValueError: there are not as many bytes as the unit's segments ask for.
    """
    side, num_frames = unit["frame_px"], sum(len(segment["frames"]) for segment in unit["segments"])
    if blob is None or not side:
        raise ValueError("it came without frames")
    return as_tensor(blob, pa.uint8(), (num_frames, side, side, 3))


def _batches(pixels: dict[int, Tensor], max_frames: int) -> Iterator[list[int]]:
    """Consecutive units with frames of one size, up to `max_frames` in all, but one unit at least."""
    batch: list[int] = []
    for i, frames in pixels.items():
        room = max_frames - sum(len(pixels[j]) for j in batch)
        if batch and (len(frames) > room or frames.shape[1:] != pixels[batch[0]].shape[1:]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _together(parts: list[Tensor], device: torch.device) -> Tensor:
    """The frames of several units in one tensor; for a GPU in pinned memory, from where copies need no waiting."""
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    together = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return torch.cat(parts, out=together)


def _finished(unit: Row, merged: list[tuple[Row, MergedSegment]]) -> Row:
    """A unit with its segments as stored, or failed because one of them cannot be stored."""
    try:
        return {**unit, "segments": [_stored(segment, tokens) for segment, tokens in merged]}
    except (ValueError, OverflowError) as error:
        return _failed(unit, f"{error}; a recipe with precision float32 may index it")


def _stored(segment: Row, merged: MergedSegment) -> Row:
    frames = segment["frames"]
    tokens = SegmentTokens(segment["segment"], len(frames), merged.local, merged.sizes, merged.spans, merged.cls)
    if merged.embedding is not None and not merged.embedding.isfinite().all():
        raise ValueError(f"the search embedding of segment {segment['segment']} is not finite")
    return {
        **tokens.to_row(),
        "start_s": segment["start_s"],
        "end_s": segment["end_s"],
        "first_frame": frames[0],
        "last_frame": frames[-1],
        "embedding": None if merged.embedding is None else merged.embedding.numpy(),
    }


def _failed(unit: Row, reason: str) -> Row:
    error = f"unit {unit['unit']} of the video could not be encoded: {reason}."
    return {**unit, "segments": [], "error_code": ErrorCode.ENCODE_FAILED, "error": error}
