"""Frames for tests: those of the reference outputs, and units of them as the decode stage hands them on."""

import json

import numpy as np
import pyarrow as pa
import torch

from longvlm.schemas import tables
from longvlm.schemas.recipe import IndexRecipe, TowerSpec


def golden_frames(case) -> torch.Tensor:
    """The frames that a golden case encodes, resized to 224 px by nearest as its reference did (LONGVLM.md, 2)."""
    meta, golden = json.loads((case / "meta.json").read_text()), np.load(case / "golden.npz")
    if "decoded_frames" in golden:
        frames = golden["decoded_frames"]
    else:
        frames = golden["video_frames"][meta["indices"]]
        frames = frames[meta.get("order", range(len(frames)))]
    rows, columns = (
        np.minimum(np.arange(224, dtype=np.float32) * np.float32(side / 224), side - 1).astype(int)
        for side in frames.shape[1:3]
    )
    return torch.from_numpy(np.ascontiguousarray(frames[:, rows][:, :, columns]))


def golden_recipe(case, tower: TowerSpec) -> IndexRecipe:
    """The recipe in which a golden case was made."""
    meta, golden = json.loads((case / "meta.json").read_text()), np.load(case / "golden.npz")
    num_segments = meta["num_frames"] // meta["frames_per_group"]
    return IndexRecipe(
        name=case.name,
        tower=tower,
        sampling="uniform",
        num_segments=num_segments,
        frames_per_segment=meta["frames_per_group"],
        tokens_per_segment=golden["local"].shape[0] // num_segments,
        num_global_layers=golden["memory"].shape[0],
        merge_schedule=tuple(max(step, 0) for step in meta["r_list"]),
        resize="nearest",
        precision="float32",
    )


def frames_table(*units: dict) -> pa.Table:
    """FRAMES rows; each unit gives `frames` (uint8 [F, px, px, 3]) and the frame numbers of its `segments`."""
    rows = []
    for i, unit in enumerate(units):
        frames = unit.pop("frames", None)
        segments = [
            {"segment": s, "start_s": float(s), "end_s": s + 1.0, "frames": list(numbers)}
            for s, numbers in enumerate(unit.pop("segments", []))
        ]
        row = {"video_id": f"video{i}", "write_id": f"write{i}", "unit": 0, "num_units": 1, "decode_ms": 1.0}
        row |= {"num_segments": len(segments), "segments": segments}
        if frames is not None:
            row |= {"frames": np.ascontiguousarray(frames).tobytes(), "frame_px": frames.shape[1]}
        rows.append({**row, **unit})
    return pa.Table.from_pylist(rows, schema=tables.FRAMES)


def segment_numbers(num_frames: int, per_segment: int) -> list[list[int]]:
    """Frame numbers 0, 3, 6, ... cut into segments, the last perhaps shorter."""
    numbers = list(range(0, 3 * num_frames, 3))
    return [numbers[i : i + per_segment] for i in range(0, num_frames, per_segment)]
