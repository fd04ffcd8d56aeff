"""What int8 costs in accuracy: the tiny world's questions, asked of float16 tokens and of the same as int8.

    python -m benchmarks.int8 [--seed 1] [--videos 100] [--benchmark tinyworld]

The videos are made and indexed once, as `longvlm evaluate --benchmark tinyworld` does it; then their tokens are stored
again by `longvlm maintain --dtype int8`, that recipe is promoted, and the same questions are asked. Of each of the two
is counted what it alone answers rightly. The last line is one JSON object.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.evaluate.run import EvaluateOrder
from longvlm.jobs.evaluate.tinyworld import TinyWorldSpec, run_tinyworld
from longvlm.jobs.operate.requantise import RequantiseOrder, run_requantise
from longvlm.pipeline.store.ledger import Store


def main() -> None:
    """Ask twice, print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--videos", type=int, default=100)
    parser.add_argument("--benchmark", default="tinyworld")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="longvlm-int8-") as scratch:
        order = EvaluateOrder(str(Path(scratch) / "store"), benchmark=given.benchmark, ray_address=IN_PROCESS)
        world = TinyWorldSpec(given.seed, given.videos)
        float16 = run_tinyworld(order, world)
        stored = run_requantise(RequantiseOrder(order.store, "int8"))
        Store.open(order.store).promote(stored.recipe)
        int8 = run_tinyworld(order, world)
        assert (stored.stopped, int8.answer_recipe == float16.answer_recipe) == (None, False)
    pairs = Counter((bool(a.is_right), bool(b.is_right)) for a, b in zip(float16.results, int8.results, strict=True))
    same = sum(a.prediction == b.prediction for a, b in zip(float16.results, int8.results, strict=True))
    num = pairs.total()
    found = {
        "videos": given.videos,
        "questions": num,
        "float16_right": pairs[True, True] + pairs[True, False],
        "int8_right": pairs[True, True] + pairs[False, True],
        "float16_alone": pairs[True, False],
        "int8_alone": pairs[False, True],
        "same_answers": same,
        "points_lost": round(100 * (pairs[True, False] - pairs[False, True]) / num, 2),
        "row_bytes_of_float16": round(stored.bytes_after / stored.bytes_before, 3),
    }
    for name, value in found.items():
        print(f"{name:22} {value:>10}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
