"""What an answerer has to know, and how its rows begin.

It loads no torch, as the stage does: a run that plans, judges or finds all answered needs none.
"""

from dataclasses import dataclass
from typing import Any

from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas import clock
from longvlm.schemas.errors import PipelineError
from longvlm.schemas.recipe import AnswerRecipe
from longvlm.schemas.tables import AskedQuestion, GroupRow


@dataclass(frozen=True)
class AnswerTerms:
    """What an answerer has to know besides its questions."""

    recipe: AnswerRecipe
    sight: Sight  # of its model
    snapshot: Snapshot
    run_id: str
    search_model: str | None  # whose text encoder is beside the stored search vectors; None where there are none


def failed_answer(
    group: GroupRow, question: AskedQuestion, recipe: AnswerRecipe, run_id: str, error: PipelineError
) -> dict[str, Any]:
    """The row of a question that has no answer, and why."""
    row = begun_row(group, question, recipe, run_id)
    return row | {"status": "failed", "error_code": error.code, "error": error.message}


def begun_row(group: GroupRow, question: AskedQuestion, recipe: AnswerRecipe, run_id: str) -> dict[str, Any]:
    """The row of a question before it is answered: what was asked, of which video, and by whom."""
    return {
        **{name: question[name] for name in ("question_id", "question", "question_hash", "type")},
        "video_id": group["video_id"],
        "uri": group["uri"],
        "write_id": group["write_id"],
        "run_id": run_id,
        "model": recipe.model,
        "answer_recipe": recipe.fingerprint,
        "decoding": recipe.decoding,
        "created_at": clock.utc_now(),
    }
