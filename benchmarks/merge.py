"""Token merging against a plain version that sorts and scatters all tokens in every step.

    python -m benchmarks.merge

Ten segments of 2560 tokens, 1024 wide, in float32, as the paper's 100 frames through ViT-L/14 give them. Runs on the
GPU where there is one. The last line is one JSON object.
"""

import json
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import interleave
from longvlm.pipeline.vision.merge import merge
from longvlm.schemas.recipe import METRIC_HEADS, halving_schedule

SEGMENTS, TOKENS, DIM, KEPT = 10, 2560, 1024, 30
ROUNDS = 15


def merge_plainly(tokens: Tensor, schedule: tuple[int, ...], heads: int = METRIC_HEADS) -> tuple[Tensor, Tensor]:
    """LONGVLM.md section 4 step by step: normalise, all scores, sort, gather, weighted scatter, concatenate."""
    sizes = torch.ones_like(tokens[..., :1])
    for step in schedule:
        num_segments, num_tokens, dim = tokens.shape
        num_merged = min(step, num_tokens // 2)
        metric = tokens.view(num_segments, num_tokens, heads, dim // heads).mean(dim=2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        best, match = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        merged, kept = order[:, :num_merged], order[:, num_merged:]
        target = match[..., None].gather(1, merged)

        def move(values: Tensor, merged: Tensor = merged, kept: Tensor = kept, target: Tensor = target) -> Tensor:
            width = values.shape[-1]
            even, odd = values[:, ::2], values[:, 1::2]
            stay = even.gather(1, kept.expand(-1, -1, width))
            taken = even.gather(1, merged.expand(-1, -1, width))
            odd = odd.scatter_reduce(1, target.expand(-1, -1, width), taken, "sum")
            return torch.cat([stay, odd], dim=1)

        weighted, sizes = move(tokens * sizes), move(sizes)
        tokens = weighted / sizes
    return tokens, sizes[..., 0]


def main() -> None:
    """Time both, check that they agree, print the medians."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokens = torch.randn(SEGMENTS, TOKENS, DIM, device=device)
    schedule = halving_schedule(TOKENS, KEPT)
    difference = (merge(tokens, schedule).tokens - merge_plainly(tokens, schedule)[0]).abs().amax(dim=-1)
    same_rows = (difference < 1e-4).float().mean().item()

    def finished(result: object) -> object:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    seconds = interleave(
        {
            "ours": lambda: finished(merge(tokens, schedule)),
            "plain": lambda: finished(merge_plainly(tokens, schedule)),
        },
        ROUNDS,
    )
    ours, plain = median(seconds["ours"]), median(seconds["plain"])
    print(f"merging {SEGMENTS} x {TOKENS} tokens of {DIM} to {KEPT}, float32, {device}, medians of {ROUNDS}")
    print(f"  ours   {ours * 1e3:9.2f} ms\n  plain  {plain * 1e3:9.2f} ms   {plain / ours:.1f} times as long")
    print(f"  rows that agree within 1e-4: {same_rows:.1%}")
    result = {"ratio_merge": plain / ours, "merge_ms": ours * 1e3, "plain_ms": plain * 1e3, "same_rows": same_rows}
    print(json.dumps({**result, "device": str(device), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
