"""Verification of hits: a language model looks at the stored tokens around each, and says yes or no by likelihood."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from longvlm.jobs.answer.loaded import LoadedModel
from longvlm.jobs.answer.options import fit_budget
from longvlm.pipeline.answering.typed import as_request
from longvlm.pipeline.engine.engine import Engine
from longvlm.pipeline.engine.requests import Group
from longvlm.pipeline.judging.calibration import calibration_error
from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.models.prefix import prefix_of
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.query.search import Hit
from longvlm.pipeline.store.shards import read_segments, read_tokens
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.vision.budget import fit
from longvlm.pipeline.vision.tokens import from_arrow
from longvlm.schemas.errors import InputError, PipelineError
from longvlm.schemas.recipe import AnswerRecipe
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


def verify(loaded: LoadedModel, snapshot: Snapshot, hits: Sequence[Hit], question: str) -> Verification:
    """Ask a model about the segment of each hit's best moment and its neighbours; no video is opened.

    Raises:
        InputError: the model cannot answer, or not from the tokens that were searched.
    """
    spec, stored = loaded.spec, loaded.stored
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
        precision=loaded.precision,
        budget=fit_budget(spec, None, _NO_NEW_TOKENS),
        focus="even",
        max_new_tokens=_NO_NEW_TOKENS,
    )
    engine = Engine(loaded.model, recipe)
    problems: dict[str, None] = {}
    yes_of: dict[Hashable, float] = {}
    for answer in engine.answer(_groups(snapshot, hits, question, spec, recipe, problems)):
        if answer.error is not None:
            problems[answer.error.message] = None
        else:
            yes_of[answer.key] = answer.shares[0]
    yes = [yes_of.get((hit.write_id, hit.segment)) for hit in hits]
    return Verification(question, yes, [*problems], _calibration(snapshot, spec))


def _groups(
    snapshot: Snapshot,
    hits: Sequence[Hit],
    question: str,
    spec: ModelSpec,
    recipe: AnswerRecipe,
    problems: dict[str, None],
) -> Iterator[Group]:
    """What is around each hit and what is asked about it, once for hits of one segment; a video is read once.

    What cannot be read is left out, and `problems` is told why.
    """
    by_video: dict[str, set[int]] = {}
    for hit in hits:
        by_video.setdefault(hit.write_id, set()).add(hit.segment)
    asked = TypedQuestion(question=question, type="bool", choices=None, schema=None)
    budget = spec.sight.budget(recipe.budget, None, recipe.focus)
    for write_id, wanted in by_video.items():
        try:
            tokens, segments = read_tokens(snapshot, [write_id]), read_segments(snapshot, [write_id])
            around = {segment: (_around(tokens, segment), _around(segments, segment)) for segment in sorted(wanted)}
            fitted = {segment: fit(from_arrow(rows), budget) for segment, (rows, _) in around.items()}
        except PipelineError as error:
            problems[error.message] = None
            continue
        for segment, video in fitted.items():
            prefix = prefix_of(video, around[segment][1].to_pylist(), spec.sight)
            yield Group(prefix, [as_request((write_id, segment), asked)])


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
