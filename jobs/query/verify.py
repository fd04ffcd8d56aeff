"""Verification of hits: a language model looks at the stored tokens around each, and says yes or no by likelihood."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch

from longvlm.jobs.answer.options import fit_budget
from longvlm.jobs.choose import choose_answer_model
from longvlm.pipeline.answering.typed import as_request
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group
from longvlm.pipeline.judging.calibration import calibration_error
from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.models.families import load_model
from longvlm.pipeline.models.prefix import prefix_of
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import Hit
from longvlm.pipeline.store.shards import read_segments, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.budget import fit
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe, Precision
from longvlm.schemas.tables import TypedQuestion

_NEIGHBOURS = 1  # segments before and after that of the best moment: what is there began earlier, or goes on
_NO_NEW_TOKENS = 1  # options are compared, and nothing is decoded

_JUDGED = """
SELECT confidence, is_right FROM verdicts
JOIN (SELECT write_id, question_id, question, answer_recipe, confidence FROM answers WHERE type = 'bool')
    USING (write_id, question_id, question, answer_recipe)
WHERE model = $1 AND is_right IS NOT NULL AND confidence IS NOT NULL
"""


@dataclass(frozen=True)
class Verification:
    """What a model says of each hit, and what is known of how far that can be trusted."""

    question: str
    yes: list[float | None]  # of each hit: the share of yes; None where it cannot be asked
    problems: list[str]  # why, a sentence each
    calibration: str  # a sentence


def verify(
    store: Store,
    snapshot: Snapshot,
    hits: Sequence[Hit],
    question: str,
    model: str | None,
    precision: Precision = "bfloat16",
) -> Verification:
    """Ask a model about the segment of each hit's best moment and its neighbours; no video is opened.

    Raises:
        InputError: the model cannot answer, or not from the tokens that were searched.
    """
    spec, stored = choose_answer_model(store, model)
    if not stored.active:
        raise InputError(
            f"the model {spec.name} reads the tokens of the recipe {stored.name}, and search goes over those of the "
            "active one; pass --model with a model for these, or promote that recipe."
        )
    recipe = AnswerRecipe(
        model=spec.name,
        weights=spec.weights,
        index_recipe=stored.fingerprint,
        template=spec.templates[0],
        precision=precision,
        budget=fit_budget(spec, None, _NO_NEW_TOKENS),
        focus="even",
        max_new_tokens=_NO_NEW_TOKENS,
    )
    engine = Engine(load_model(spec.name, precision, "cuda" if torch.cuda.is_available() else "cpu"), recipe)
    answers = {one.key: one for one in engine.answer(_groups(snapshot, hits, question, spec, recipe))}
    problems = {one.error.message: None for one in answers.values() if one.error is not None}
    yes = [answers[place].shares[0] if answers[place].shares else None for place in range(len(hits))]
    return Verification(question, yes, [*problems], _calibration(snapshot, spec))


def _groups(
    snapshot: Snapshot, hits: Sequence[Hit], question: str, spec: ModelSpec, recipe: AnswerRecipe
) -> Iterator[Group]:
    """What is around each hit and what is asked about it; the hits of a video, which is read once, one by one."""
    by_video: dict[str, list[int]] = {}
    for place, hit in enumerate(hits):
        by_video.setdefault(hit.write_id, []).append(place)
    for write_id, places in by_video.items():
        tokens, segments = read_tokens(snapshot, [write_id]), read_segments(snapshot, [write_id])
        for place in places:
            around = [_around(rows, hits[place].segment) for rows in (tokens, segments)]
            budget = spec.sight.budget(recipe.budget, None, recipe.focus)
            prefix = prefix_of(fit(from_arrow(around[0]), budget), around[1].to_pylist(), spec.sight)
            asked = TypedQuestion(question=question, type="bool", choices=None, schema=None)
            yield Group(prefix, [as_request(place, asked)])


def _around(rows: pa.Table, segment: int) -> pa.Table:
    """The rows of a segment and its neighbours."""
    distance = pc.abs(pc.subtract(rows["segment"], segment))
    return rows.filter(pc.less_equal(distance, _NEIGHBOURS))


def _calibration(snapshot: Snapshot, spec: ModelSpec) -> str:
    """How far a model's yes is from the share that is right, as far as the store's own verdicts say."""
    with catalog.connect(snapshot, ("answers", "verdicts")) as con:
        judged = con.execute(_JUDGED, [spec.name]).fetchall()
    error = calibration_error(*(list(part) for part in zip(*judged, strict=True))) if judged else None
    if error is None:
        return (
            f"how far the yes of {spec.name} can be trusted was not measured on this store; `longvlm evaluate` with "
            "labels of your own says so"
        )
    return (
        f"the confidences of {spec.name} are {100 * error:.1f} points from the share that is right, on the average, by "
        f"the {len(judged)} yes/no answers of this store that were judged"
    )
