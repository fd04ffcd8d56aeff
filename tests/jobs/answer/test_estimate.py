import json
from dataclasses import replace

import pyarrow as pa
from stores import LONG, index

from longvlm.jobs.answer.estimate import estimate
from longvlm.jobs.answer.plan import plan
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.recipe import AnswerRecipe

RECIPE = AnswerRecipe(model="m", weights="w", index_recipe=LONG.fingerprint, budget=10_000, max_new_tokens=100)
ASKED = [("x" * 40, "text"), ("y" * 41, "bool")]


def planned(store):
    """What is to be asked of a store in which nothing is answered, under whatever recipe."""
    rows = [{"question": question, "type": kind} for question, kind in ASKED]
    return plan(store.pin(), pa.Table.from_pylist(rows, schema=tables.QUESTIONS), RECIPE)


def record(store, run_id, seq, **counts):
    row = {"run_id": run_id, "job": "answer", "counts": json.dumps({"run_id": run_id, **counts}), "seq": seq}
    store.append("runs", pa.Table.from_pylist([row], schema=tables.RUNS))


def test_tokens_follow_from_segments_and_seconds_from_the_last_run(tmp_path):
    store = Store.create(str(tmp_path / "store"))
    index(store, ["a", "b", "c"])  # four segments each
    store.register_recipe(LONG, "m")
    visual, asking = 4 * 80 + 5, planned(store)

    def estimated(recipe=RECIPE, num_global=5):
        return estimate(asking, recipe, LONG, num_global, store.pin())

    found = estimated()
    assert found == {
        "prefill_tokens": 3 * (visual + 10 + 11),
        "decode_tokens": 3 * 100,
        "seconds": None,
        "rates_of_run": None,
    }
    assert estimated(replace(RECIPE, budget=100))["prefill_tokens"] == 3 * (100 + 21)
    for focus, each in (("even", 100), ("question", 2 * 100), ("auto", 2 * 100)):  # perhaps a prefix a question
        assert estimated(replace(RECIPE, budget=100, focus=focus))["prefill_tokens"] == 3 * (each + 21)
        assert estimated(replace(RECIPE, focus=focus))["prefill_tokens"] == 3 * (visual + 21)
    assert estimated(replace(RECIPE, tokens_per_segment=8), 0)["prefill_tokens"] == 3 * (32 + 21)

    rates = {"prefill_tokens": 1000, "prefill_s": 2.0, "decode_tokens": 50, "decode_s": 5.0, "questions": 5}
    record(store, "older", 1, **rates, workers=1)
    record(store, "newer", 2, **{**rates, "prefill_s": 4.0}, workers=2)
    record(store, "stopped-early", 3, asked=7)
    found = estimated()
    prefill, decode = 3 * (visual + 21), 3 * 10
    assert found["decode_tokens"] == decode
    assert found["rates_of_run"] == "newer"
    assert found["seconds"] == round((prefill * 4.0 / 1000 + decode * 5.0 / 50) / 2, 1)
