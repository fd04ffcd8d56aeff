"""The tower and the merging at ViT-L/14 shapes on a CPU: how much of it they use, and what share merging has.

    python -m benchmarks.encode

Random weights, bfloat16 and float32, a few frames, scaled to 100. The peak is a large square matrix product in the same
precision, timed in turn with the tower. On a GPU: `python -m benchmarks.gpu`. The last line is one JSON object.
"""

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from benchmarks.measure import interleave, square_product
from longvlm.pipeline.vision.merge import merge
from longvlm.pipeline.vision.pixels import Normalisation, Pixels
from longvlm.pipeline.vision.towers.clip_tower import ClipTower
from longvlm.schemas.recipe import halving_schedule
from longvlm.schemas.tower import TowerSpec

FRAMES_PER_VIDEO, FRAMES_PER_SEGMENT, TOKENS_PER_SEGMENT = 100, 10, 30
FRAMES, ROUNDS, SIDE = 8, 3, 3072  # the last: of the square product that stands for the peak


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower: CLIP's, whose frames have a CLS row, or SigLIP's, whose have none."""

    name: str
    layers: int
    dim: int
    heads: int
    inner: int  # width inside a block's MLP
    image_px: int
    patch_px: int = 14
    has_cls: bool = True

    @property
    def spec(self) -> TowerSpec:
        """As a recipe knows it."""
        grid = (self.image_px // self.patch_px,) * 2
        return TowerSpec(
            f"random {self.name}", "random", self.layers, grid, self.dim, self.image_px, self.has_cls, None
        )

    def flops_per_frame(self) -> float:
        """Two per multiply-add of what is computed for the next to last hidden state, and the last layers' CLS rows."""
        dim, patches = self.dim, self.spec.num_patches
        tokens = patches + self.has_cls
        mlp = 2 * dim * self.inner
        block = tokens * (4 * dim**2 + mlp) + 2 * tokens**2 * dim
        # of the last block only keys, values and the CLS row, if there is one
        last_block = tokens * 2 * dim**2 + 2 * dim**2 + mlp + 2 * tokens * dim if self.has_cls else 0
        embedding = patches * 3 * self.patch_px**2 * dim
        return 2.0 * (embedding + (self.layers - 1) * block + last_block)


VIT_L = TowerShape("ViT-L/14", 24, 1024, 16, 4096, 224)


def random_tower(shape: TowerShape, dtype: torch.dtype, device: torch.device) -> ClipTower:
    """A tower without weights of its own, drawn on the device."""
    settings = {
        "hidden_size": shape.dim,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.image_px,
        "patch_size": shape.patch_px,
    }
    pixels = Pixels(shape.image_px, shape.image_px, 3, Normalisation(1 / 255, (0.5,) * 3, (0.25,) * 3))
    with torch.device(device):
        if shape.has_cls:  # "silu" is what `load_tower` makes of CLIP's activation
            model = CLIPVisionModel(CLIPVisionConfig(**settings, hidden_act="silu"))
        else:
            model = SiglipVisionModel(SiglipVisionConfig(**settings, vision_use_head=False))
    model = model.to(dtype).eval()
    encoder = getattr(model, "vision_model", model)  # some transformers wrap it once more
    return ClipTower(encoder, shape.spec, pixels, None)


def measure(precision: str) -> dict[str, Any]:
    """Time the tower, the product and the merging in turn; scale to 100 frames."""
    device, dtype = torch.device("cpu"), getattr(torch, precision)
    tower = random_tower(VIT_L, dtype, device)
    frames = torch.randint(0, 256, (FRAMES, VIT_L.image_px, VIT_L.image_px, 3), dtype=torch.uint8)
    tokens_per_segment = FRAMES_PER_SEGMENT * VIT_L.spec.num_patches
    segments = torch.randn(FRAMES_PER_VIDEO // FRAMES_PER_SEGMENT, tokens_per_segment, VIT_L.dim, dtype=dtype)
    schedule = halving_schedule(tokens_per_segment, TOKENS_PER_SEGMENT)
    seconds = interleave(
        {
            "encode": lambda: tower.encode(frames),
            "product": square_product(device, SIDE, dtype),
            "merge": lambda: merge(segments, schedule),
        },
        ROUNDS,
    )
    encode_s = median(seconds["encode"]) * FRAMES_PER_VIDEO / FRAMES
    merge_s, peak = median(seconds["merge"]), 2 * SIDE**3 / min(seconds["product"])
    flops_per_s = VIT_L.flops_per_frame() * FRAMES_PER_VIDEO / encode_s
    return {
        "precision": precision,
        "frames_per_s": FRAMES_PER_VIDEO / encode_s,
        "encode_s": encode_s,
        "merge_s": merge_s,
        "tflops": flops_per_s / 1e12,
        "peak_tflops": peak / 1e12,
        "peak_share": flops_per_s / peak,
        "merge_share": merge_s / (merge_s + encode_s),
    }


def main() -> None:
    """Measure both precisions and print a table."""
    name = f"{torch.get_num_threads()} CPU threads"
    torch.manual_seed(0)
    results = [measure(precision) for precision in ("bfloat16", "float32")]
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
