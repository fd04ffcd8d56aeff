"""What an answer run would cost, from its plan and the rates that the last run measured; no shard is opened."""

import json
from typing import Any

from longvlm.jobs.answer.plan import Asking
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe


def estimate(
    asking: Asking, recipe: AnswerRecipe, stored: IndexRecipe, num_global: int, last: Snapshot
) -> dict[str, Any]:
    """Tokens to prefill and to decode, and seconds.

    A video's visual tokens follow from its segments: the recipe's tokens for each (fewer for a short last one) and the
    global ones, within the budget; with a focus on questions, as if no two saw the same of a video. Decoding is taken
    to be as long as the last run's answers were; where no run was measured yet, as long as it may be, and the seconds
    are None.

    Args:
        asking: the plan.
        recipe: of the answers.
        stored: of the tokens.
        num_global: global tokens at the head of a prefix.
        last: a snapshot whose `runs` are looked at.
    """
    per_segment = min(stored.tokens_per_segment, recipe.tokens_per_segment or stored.tokens_per_segment)
    follows = recipe.focus in ("question", "auto")
    visual, text, num_decoded = asking.workload(per_segment, num_global, recipe.budget, follows_questions=follows)
    run = last_measured_run(last)
    mean_length = run["decode_tokens"] / run["questions"] if run else 0.0
    found = {
        "prefill_tokens": visual + text,
        "decode_tokens": round(num_decoded * (mean_length or recipe.max_new_tokens)),
        "seconds": None,
        "rates_of_run": None,
    }
    if run:
        busy_s = sum(found[f"{part}_tokens"] * run[f"{part}_s"] / max(run[f"{part}_tokens"], 1) for part in _PARTS)
        found |= {"seconds": round(busy_s / run["workers"], 1), "rates_of_run": run["run_id"]}
    return found


_PARTS = ("prefill", "decode")


def last_measured_run(snapshot: Snapshot) -> dict[str, Any] | None:
    """The counts of the newest run that prefilled anything, be it of `answer` or of `nightly`; None before it."""
    sql = """
        SELECT CASE job WHEN 'answer' THEN counts ELSE counts->'answer' END
        FROM runs WHERE job IN ('answer', 'nightly') ORDER BY seq DESC
    """
    with catalog.connect(Snapshot({"runs": snapshot.table("runs")})) as con:
        rows = con.execute(sql).fetchall()
    return next((counts for (text,) in rows if text and (counts := json.loads(text)).get("prefill_tokens")), None)
