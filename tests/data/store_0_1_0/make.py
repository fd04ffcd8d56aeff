"""The store beside this file, as version 0.1.0 made it: two clips and one broken file, asked two questions, judged.

To be run in a checkout of that version alone, whose stores later versions must read:
    PYTHONPATH=$PWD/.links:$PWD/tests/helpers python tests/data/store_0_1_0/make.py
The model has random weights and is not kept; what names its answers stands in `facts.json`.
"""

import json
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from clips import write_clip
from longvlm.jobs.answer.options import fit_budget, fit_focus, fit_template
from longvlm.jobs.choose import choose_answer_model
from longvlm.jobs.evaluate.run import EvaluateOrder, run_evaluate
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.models.longvlm.init import build_untrained
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.recipe import AnswerRecipe
from models import save_clip_tower

HERE = Path(__file__).parent
WORLD = Path("/tmp/longvlm-0.1.0")  # where the rows say that it was
LABELS = [
    {"video": "one", "question": "Red?", "answer": "yes", "type": "bool"},
    {"video": "one", "question": "What is it?", "answer": "a dog", "question_id": "what"},
]
MAX_NEW_TOKENS = 4


def make_store() -> Store:
    """Index and ask by the program's own jobs."""
    save_clip_tower(WORLD / "model" / "tower")
    build_untrained(WORLD / "model", tower="tower", tower_dim=64)
    (WORLD / "videos").mkdir()
    write_clip(WORLD / "videos" / "one.mp4", 25)
    write_clip(WORLD / "videos" / "two.mp4", 75)
    (WORLD / "videos" / "broken.mp4").write_bytes(b"no video at all")
    (WORLD / "labels.jsonl").write_text("\n".join(map(json.dumps, LABELS)))
    store = str(WORLD / "store")
    run_index(IndexOrder(Source(str(WORLD / "videos")), store, model=str(WORLD / "model"), recipe="tiny"))
    run_evaluate(EvaluateOrder(store, labels=str(WORLD / "labels.jsonl"), max_new_tokens=MAX_NEW_TOKENS))
    return Store.open(store)


def answer_recipe(store: Store) -> AnswerRecipe:
    """How the answers were made, as the answer job puts it together."""
    spec, stored = choose_answer_model(store, None)
    return AnswerRecipe(
        model=spec.name,
        weights=spec.weights,
        index_recipe=stored.recipe.fingerprint,
        template=fit_template(spec, None),
        budget=fit_budget(spec, None, MAX_NEW_TOKENS),
        focus=fit_focus(stored, None, None),
        max_new_tokens=MAX_NEW_TOKENS,
    )


if __name__ == "__main__":
    assert version("longvlm-index") == "0.1.0", "this version's stores are not those of 0.1.0"
    shutil.rmtree(WORLD, ignore_errors=True)
    recipe = answer_recipe(make_store())
    facts = {"answer_recipe": asdict(recipe), "fingerprint": recipe.fingerprint, "questions": LABELS}
    (HERE / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    (WORLD / "store" / "index.duckdb").unlink()  # a convenience, which says where the store was
    shutil.rmtree(HERE / "store", ignore_errors=True)
    shutil.copytree(WORLD / "store", HERE / "store")
    shutil.rmtree(WORLD)
