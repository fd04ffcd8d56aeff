"""Linear layers in bfloat16 on a CPU: those of the engine against torch's own.

    python -m benchmarks.linear

A token count at a time, over 350 MB of weight matrices of the shapes of benchmarks.answer's model, so that none is in a
cache. Both are bound by reading the weights. The last line is one JSON object: torch's seconds over the engine's.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave
from longvlm.pipeline.engine.linear import Linear

SHAPES = ((2816, 1024), (1024, 2816), (1024, 1024))  # outputs, inputs
WEIGHT_BYTES, ROUNDS = 350e6, 7


def run(layers: Sequence[Callable[[Tensor], Tensor]], given: Tensor) -> None:
    """Every layer once."""
    for layer in layers:
        layer(given)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    ratios = {}
    for num_outputs, num_inputs in SHAPES:
        count = int(WEIGHT_BYTES / (2 * num_outputs * num_inputs))
        theirs = [nn.Linear(num_inputs, num_outputs, bias=False, dtype=torch.bfloat16) for _ in range(count)]
        ours = [Linear([layer]) for layer in theirs]
        for num_tokens in (1, 2, 8, 16, 32):
            given = torch.randn(num_tokens, num_inputs, dtype=torch.bfloat16)
            taken = interleave({"torch": partial(run, theirs, given), "engine": partial(run, ours, given)}, ROUNDS)
            theirs_s, ours_s = median(taken["torch"]), median(taken["engine"])
            ratios[f"{num_outputs}x{num_inputs}_{num_tokens}"] = theirs_s / ours_s
            print(
                f"{num_outputs:>5} x {num_inputs:<5} {num_tokens:>3} tokens  torch {theirs_s * 1e3:6.1f} ms  "
                f"engine {ours_s * 1e3:6.1f} ms  ratio {theirs_s / ours_s:.2f}"
            )
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
