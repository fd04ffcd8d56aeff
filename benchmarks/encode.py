"""The tower and the merging at ViT-L/14 shapes: how much of the machine they use, and what share merging has.

    python -m benchmarks.encode

Random weights. On a CPU in bfloat16 and float32 over a few frames, scaled to 100; on a GPU in bfloat16 over 100. The
peak is a large square matrix product in the same precision, timed in turn with the tower. The last line is one JSON
object.
"""

import json
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.measure import interleave
from pipeline.vision.encode import Tower
from pipeline.vision.merge import merge
from pipeline.vision.pixels import Pixels
from schemas.recipe import TowerSpec, halving_schedule

LAYERS, DIM, IMAGE_PX, PATCH_PX, HEADS = 24, 1024, 224, 14, 16
FRAMES_PER_VIDEO, FRAMES_PER_SEGMENT, TOKENS_PER_SEGMENT = 100, 10, 30
SPEC = TowerSpec("random ViT-L/14", "random", LAYERS, (IMAGE_PX // PATCH_PX,) * 2, DIM, IMAGE_PX, True, None)  # noqa: FBT003 - has_cls
SETTINGS = {  # device: precisions, frames, rounds, side of the square product that stands for the peak
    "cpu": (("bfloat16", "float32"), 8, 3, 3072),
    "cuda": (("bfloat16",), FRAMES_PER_VIDEO, 20, 16384),
}


def flops_per_frame() -> float:
    """Two per multiply-add of what the tower computes; of the last block only keys, values and the CLS row."""
    num_tokens = SPEC.num_patches + 1
    block = num_tokens * 12 * DIM**2 + 2 * num_tokens**2 * DIM
    last_block = num_tokens * 2 * DIM**2 + 10 * DIM**2 + 2 * num_tokens * DIM
    embedding = SPEC.num_patches * 3 * PATCH_PX**2 * DIM
    return 2.0 * (embedding + (LAYERS - 1) * block + last_block)


def random_tower(dtype: torch.dtype, device: torch.device) -> Tower:
    """A tower of the paper's shapes without weights of its own."""
    config = CLIPVisionConfig(
        hidden_size=DIM,
        intermediate_size=4 * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        hidden_act="silu",  # what `load_tower` makes of CLIP's activation
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    pixels = Pixels(IMAGE_PX, IMAGE_PX, 3, 1 / 255, (0.5,) * 3, (0.25,) * 3)
    model = CLIPVisionModel(config).to(device, dtype).eval()
    return Tower(getattr(model, "vision_model", model), SPEC, pixels, None)  # early transformers 5 wraps it once more


def measure(precision: str, device: torch.device) -> dict[str, Any]:
    """Time the tower, the product and the merging in turn; scale to 100 frames."""
    _, num_frames, rounds, side = SETTINGS[device.type]
    dtype = getattr(torch, precision)
    tower = random_tower(dtype, device)
    frames = torch.randint(0, 256, (num_frames, IMAGE_PX, IMAGE_PX, 3), dtype=torch.uint8)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    tokens_per_segment = FRAMES_PER_SEGMENT * SPEC.num_patches
    segments = torch.randn(FRAMES_PER_VIDEO // FRAMES_PER_SEGMENT, tokens_per_segment, DIM, device=device, dtype=dtype)
    schedule = halving_schedule(tokens_per_segment, TOKENS_PER_SEGMENT)

    def finished(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    seconds = interleave(
        {
            "encode": finished(lambda: tower.encode(frames)),
            "product": finished(lambda: torch.mm(left, right.T, out=product)),
            "merge": finished(lambda: merge(segments, schedule)),
        },
        rounds,
    )
    encode_s = median(seconds["encode"]) * FRAMES_PER_VIDEO / num_frames
    merge_s, peak = median(seconds["merge"]), 2 * side**3 / min(seconds["product"])
    return {
        "precision": precision,
        "frames_per_s": FRAMES_PER_VIDEO / encode_s,
        "encode_s": encode_s,
        "merge_s": merge_s,
        "tflops": flops_per_frame() * FRAMES_PER_VIDEO / encode_s / 1e12,
        "peak_tflops": peak / 1e12,
        "peak_share": flops_per_frame() * FRAMES_PER_VIDEO / encode_s / peak,
        "merge_share": merge_s / (merge_s + encode_s),
    }


def main() -> None:
    """Measure every precision of this device and print a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    torch.manual_seed(0)
    results = [measure(precision, device) for precision in SETTINGS[device.type][0]]
    print(f"ViT-L/14, {FRAMES_PER_VIDEO} frames in segments of {FRAMES_PER_SEGMENT}, {name}")
    print(f"{'precision':<10} {'encode s':>9} {'merge s':>8} {'TFLOP/s':>8} {'peak':>7} {'of peak':>8} {'merging':>8}")
    for row in results:
        print(
            f"{row['precision']:<10} {row['encode_s']:9.3f} {row['merge_s']:8.4f} {row['tflops']:8.2f} "
            f"{row['peak_tflops']:7.2f} {row['peak_share']:8.1%} {row['merge_share']:8.2%}"
        )
    ratios = {
        f"{kind}_{row['precision']}": row[kind]
        for row in results
        for kind in ("peak_share", "merge_share", "frames_per_s", "tflops", "peak_tflops")
    }
    print(json.dumps({"device": name, **ratios}))


if __name__ == "__main__":
    main()
