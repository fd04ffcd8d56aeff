"""Frames in host memory to merged tokens in host memory: the Encode stage's own function, at three towers' shapes.

A call gets what the stage gets: a table of 8 units of 100 frames. Peak is a square product of this run. The merging is
timed by itself over as many patches. Of the copies, those of the frames can be hidden behind computing: what of them is
not is the difference to calls whose frames lie on the device already, and the rest is called hidden.

Shape letters: F frames, S segments, T tokens of a segment, D channels.
"""

# ruff: noqa: N806 - tensors are named by their shape

from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.encode import VIT_L, TowerShape, random_tower
from benchmarks.gpu.section import Found, Run, check
from benchmarks.measure import finished, interleave, peak_flops
from longvlm.pipeline.transfer import Fetch
from longvlm.pipeline.vision.encode import encode_units
from longvlm.pipeline.vision.merge import Merged, merge
from longvlm.pipeline.vision.towers.clip_tower import FRAMES_PER_FORWARD, ClipTower
from longvlm.schemas.recipe import IndexRecipe, long
from longvlm.schemas.tables import ENCODED, FRAMES

SHAPES = (
    VIT_L,
    TowerShape("ViT-L/14-336", 24, 1024, 16, 4096, 336),
    TowerShape("SigLIP so400m/14-384", 27, 1152, 16, 4304, 384, has_cls=False),
)
TINY_SHAPES = (TowerShape("tiny CLIP", 3, 64, 4, 128, 56), TowerShape("tiny SigLIP", 3, 64, 4, 128, 70, has_cls=False))
UNITS, SEGMENTS_PER_UNIT, SIDE, ROUNDS = 8, 10, 8192, 3
TINY_UNITS, TINY_SEGMENTS_PER_UNIT, TINY_SIDE, TINY_ROUNDS = 2, 2, 256, 1
# Atomic sums of a GPU come in any order, which now and then changes what a token is merged with.
MUST_BE_THE_SAME = 0.99


def run(run: Run) -> None:
    """Every shape; the figures of the first are the section's."""
    torch.manual_seed(0)
    side = TINY_SIDE if run.is_tiny else SIDE
    flops = peak_flops(run.device, side)
    run.note(peak_tflops=flops / 1e12, product_side=side)
    run.say(f"peak {flops / 1e12:.3g} TFLOP/s ({side} cubed, bfloat16)")
    for number, shape in enumerate(TINY_SHAPES if run.is_tiny else SHAPES):
        found = run.part(shape.name, lambda shape=shape: measure(run, shape, flops))  # type: ignore[misc]
        if found and not number:
            run.note(**{name: found[name] for name in ("frames_per_s", "peak_share", "merge_share")})
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(run: Run, shape: TowerShape, flops: float) -> Found:
    """One tower: whether its tokens are right, then how fast they come."""
    device = run.device
    tower = random_tower(shape, torch.bfloat16, device)
    recipe = long(tower.spec)
    num_units, per_unit = (TINY_UNITS, TINY_SEGMENTS_PER_UNIT) if run.is_tiny else (UNITS, SEGMENTS_PER_UNIT)
    frames = made_up_frames(recipe, num_units, per_unit)
    first, second = (encode_units(frames, tower, recipe) for _ in range(2))
    check_tokens(first, recipe, num_units, per_unit)
    same = same_tokens(first, second)
    num_frames = num_units * per_unit * recipe.frames_per_segment
    pixels_F = torch.from_numpy(
        np.concatenate([np.frombuffer(blob.as_buffer(), np.uint8) for blob in frames["frames"]])
    )
    pixels_F = pixels_F.view(num_frames, shape.image_px, shape.image_px, 3)
    if device.type == "cuda":
        pixels_F = pixels_F.pin_memory()
    encoded = tower.encode(pixels_F, recipe.feature_layer, recipe.num_global_layers)
    patches_STD = encoded.patches.view(-1, recipe.patches_per_segment, shape.dim)
    schedule = recipe.schedule_for(recipe.patches_per_segment)
    merged, resident = merge(patches_STD, schedule), Resident(tower, pixels_F)
    seconds = interleave(
        {
            "whole": lambda: encode_units(frames, tower, recipe),
            "resident": lambda: resident.encode_units(frames, recipe),
            "tower": finished(lambda: tower.encode(pixels_F, recipe.feature_layer, recipe.num_global_layers), device),
            "merge": finished(lambda: merge(patches_STD, schedule), device),
            "copy in": finished(lambda: copy_in(pixels_F, device), device),
            "copy out": lambda: copy_out(merged),
        },
        TINY_ROUNDS if run.is_tiny else ROUNDS,
    )
    took = {name: median(values) for name, values in seconds.items()}
    found = explain(took, num_frames, shape.flops_per_frame(), flops) | {"same_tokens": same}
    if device.type == "cpu":  # nothing is copied
        found["copies_hidden"] = None
    hidden = "" if device.type == "cpu" else f", of copying in {found['copies_hidden']:.0%} hidden"
    run.say(
        f"{shape.name}: {found['frames_per_s']:.0f} frames/s, {found['peak_share']:.0%} of peak, merging "
        f"{found['merge_share']:.1%}, copies {found['copy_share']:.1%}{hidden}"
    )
    run.note(**{shape.name: found})
    check(same == 1 or (device.type == "cuda" and same > MUST_BE_THE_SAME), f"twice the same frames: {same:.2%} equal.")
    return found


def explain(took: dict[str, float], num_frames: int, flops_per_frame: float, flops: float) -> Found:
    """What the seconds mean."""
    whole_s = took["whole"]
    shown_s = min(max(whole_s - took["resident"], 0), took["copy in"])
    return {
        "frames": num_frames,
        "frames_per_s": num_frames / whole_s,
        "peak_share": num_frames * flops_per_frame / whole_s / flops,
        "tower_peak_share": num_frames * flops_per_frame / took["tower"] / flops,
        "merge_share": took["merge"] / whole_s,
        "copy_share": (took["copy in"] + took["copy out"]) / whole_s,
        "copies_hidden": 1 - shown_s / took["copy in"],
        "rest_share": max(1 - (took["tower"] + took["merge"]) / whole_s, 0),  # rows, tables, and copies not hidden
        "seconds": {name.replace(" ", "_"): seconds for name, seconds in took.items()},
    }


def made_up_frames(recipe: IndexRecipe, num_units: int, per_unit: int) -> pa.Table:
    """Units of random frames as the decode stage hands them on."""
    draw, (height, width) = np.random.default_rng(0), recipe.tower.frame_size
    num_frames = recipe.frames_per_segment
    segments = [
        {
            "segment": s,
            "start_s": 10.0 * s,
            "end_s": 10.0 * (s + 1),
            "frames": [s * 250 + frame * 25 for frame in range(num_frames)],
            "times_s": [10.0 * s + frame for frame in range(num_frames)],
        }
        for s in range(per_unit)
    ]
    rows = [
        {
            "video_id": f"video {unit}",
            "write_id": f"write {unit}",
            "unit": 0,
            "num_units": 1,
            "num_segments": per_unit,
            "decode_ms": 0.0,
            "segments": segments,
            "frame_height": height,
            "frame_width": width,
            "frames": draw.bytes(per_unit * num_frames * height * width * 3),
        }
        for unit in range(num_units)
    ]
    return pa.Table.from_pylist(rows, schema=FRAMES)


def check_tokens(encoded: pa.Table, recipe: IndexRecipe, num_units: int, per_unit: int) -> None:
    """Every unit has all its segments, and these as many tokens as the recipe says, each a number."""
    check(encoded.schema == ENCODED, "what was encoded has not the columns that it should have.")
    check(encoded.num_rows == num_units, f"{num_units} units went in, and {encoded.num_rows} came out.")
    for unit in encoded.to_pylist():
        check(unit["error_code"] is None, f"a unit could not be encoded: {unit['error']}")
        check(len(unit["segments"]) == per_unit, f"a unit has {len(unit['segments'])} segments.")
        for segment in unit["segments"]:
            shape = (recipe.tokens_per_segment, recipe.tower.dim)
            local = np.frombuffer(segment["local"], np.float16)
            check(local.size == shape[0] * shape[1], f"a segment has {local.size} numbers, and should have {shape}.")
            check(bool(np.isfinite(local).all()), "a token is not finite.")
            merged = int(np.frombuffer(segment["sizes"], np.uint16).sum())
            check(merged == recipe.patches_per_segment, f"a segment's tokens stand for {merged} patches.")


def same_tokens(first: pa.Table, second: pa.Table) -> float:
    """The share of numbers that two encodings of the same frames have in common."""
    ours, theirs = (
        np.concatenate([np.frombuffer(s["local"], np.float16) for unit in table.to_pylist() for s in unit["segments"]])
        for table in (first, second)
    )
    return float((ours == theirs).mean())


class Resident:
    """A tower whose frames lie on the device already."""

    def __init__(self, tower: ClipTower, pixels_F: Tensor) -> None:  # noqa: N803
        self.tower, self._place = tower, 0
        self._prepared = tower.pixels.prepare(pixels_F, tower.device, tower.dtype)

    def encode_units(self, frames: pa.Table, recipe: IndexRecipe) -> pa.Table:
        """As the stage does it."""
        self._place, pixels = 0, self.tower.pixels
        self.tower.pixels = self  # type: ignore[assignment] # it needs no more of them than `prepare`
        try:
            return encode_units(frames, self.tower, recipe)
        finally:
            self.tower.pixels = pixels

    def prepare(self, frames: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """In place of `Pixels.prepare`, which is given all frames in order: nothing travels."""
        start, self._place = self._place, self._place + len(frames)
        return self._prepared[start : self._place]


def copy_in(pixels_F: Tensor, device: torch.device) -> None:  # noqa: N803
    """The frames alone, from pinned memory."""
    size = FRAMES_PER_FORWARD[device.type]
    for start in range(0, len(pixels_F), size):
        pixels_F[start : start + size].to(device, non_blocking=True)


def copy_out(merged: Merged) -> Any:
    """The tokens alone, to pinned memory."""
    return Fetch(merged.tokens, merged.sizes, merged.spans).wait()
