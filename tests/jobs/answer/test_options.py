from dataclasses import replace

import pytest
from stores import LONG

from longvlm.jobs.answer.options import ROOM_FOR_QUESTION, fit_budget, fit_focus, fit_template
from longvlm.pipeline.models.contract import ModelSpec
from longvlm.pipeline.models.prefix import Sight
from longvlm.pipeline.store.ledger import RegisteredRecipe
from longvlm.schemas.errors import InputError

SPEC = ModelSpec("m", Sight("t", -2, 5), "w", 64, 2048, ("one", "two"), "longvlm")
SEEN = RegisteredRecipe(LONG.fingerprint, "long", LONG.spec(), "m", active=True, registered_seq=1)
BLIND_TOWER = replace(LONG, tower=replace(LONG.tower, search_dim=None))
BLIND = replace(SEEN, spec=BLIND_TOWER.spec())


def test_without_a_budget_a_video_has_what_the_context_leaves():
    assert fit_budget(SPEC, None, 256) == 2048 - 256 - ROOM_FOR_QUESTION
    assert fit_budget(SPEC, 305, 256) == 305


@pytest.mark.parametrize(
    ("context", "budget", "says"),
    [(700, None, "leave none for the video"), (2048, 5, "nothing of a video"), (2048, 1792, "lower --budget")],
)
def test_a_budget_that_cannot_work_is_refused(context, budget, says):
    with pytest.raises(InputError, match=says):
        fit_budget(replace(SPEC, context=context), budget, 256)


def test_a_template_is_one_of_the_models():
    assert fit_template(SPEC, None) == "one"
    assert fit_template(SPEC, "two") == "two"
    with pytest.raises(InputError, match="no template three; it has one, two"):
        fit_template(SPEC, "three")


def test_every_video_is_answered_unless_a_budget_is_named():
    assert fit_focus(SEEN, None, None) == "even"
    assert fit_focus(SEEN, None, 100) is None
    assert fit_focus(SEEN, "question", None) == "question"
    assert fit_focus(BLIND, "even", 100) == "even"
    with pytest.raises(InputError, match="use --focus even"):
        fit_focus(BLIND, "question", 100)
