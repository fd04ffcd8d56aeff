from dataclasses import replace

import pytest
from stores import LONG

from longvlm.jobs.answer.options import (
    ROOM_FOR_QUESTION,
    check_vocabulary,
    fit_budget,
    fit_focus,
    fit_template,
    note_decoding,
)
from longvlm.pipeline.models.contract import ModelSpec, Vocabulary
from longvlm.pipeline.models.longvlm.init import word_tokenizer
from longvlm.pipeline.models.sight import Sight
from longvlm.pipeline.store.ledger import RegisteredRecipe
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import AnswerRecipe

WORDS = Vocabulary(word_tokenizer(["red", "car"]), (2,))
SPEC = ModelSpec("m", Sight("t", -2, 5), "w", 64, 2048, ("one", "two"), "longvlm", WORDS)
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
    assert fit_focus(BLIND, "auto", 100) == "auto"
    with pytest.raises(InputError, match="use --focus even"):
        fit_focus(BLIND, "question", 100)


@pytest.mark.parametrize(
    ("asked", "wanted", "how"),
    [
        ({"do_sample": True}, "sampling", "--temperature 1.0 samples."),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            "sampling (temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05)",
            "--temperature 0.7 --top-p 0.8 samples; there is no option for top_k and repetition_penalty.",
        ),
        ({"repetition_penalty": 1.05}, "repetition_penalty 1.05", "there is no option for repetition_penalty."),
    ],
)
def test_what_a_model_asks_of_decoding_is_a_note_with_the_options_for_it(asked, wanted, how):
    spec, recipe = replace(SPEC, asked_decoding=asked), AnswerRecipe("m", "w", "i")
    said = f"generation_config.json of m asks for {wanted}, but answers are decoded greedily; {how}"
    assert note_decoding(spec, recipe) == said
    assert note_decoding(spec, replace(recipe, temperature=0.5)) is None
    assert note_decoding(SPEC, recipe) is None


def test_what_a_vocabulary_cannot_spell_is_refused_by_the_question():
    digits = replace(SPEC, vocabulary=Vocabulary(word_tokenizer([*"0123456789"]), (2,)))
    few = replace(SPEC, vocabulary=Vocabulary(word_tokenizer([*"012345789"]), (2,)))
    braces = replace(SPEC, vocabulary=Vocabulary(word_tokenizer([*"{}"]), (2,)))
    number, anything = ("number", None, "How many?"), ("json", None, "What?")
    schema = ("json", '{"type":"object"}', "What?")
    check_vocabulary(SPEC, [])
    check_vocabulary(digits, [number, anything])  # a number is JSON
    check_vocabulary(braces, [schema])
    for spec, asked, says in (
        (SPEC, number, "of m cannot spell the answer of type number to 'How many?' .it has no token for 0 1 2 3 4 5 6"),
        (few, number, "no token for 6"),
        (digits, schema, r"of type json to 'What\?' .it has no token for { } \[ \] \" : ,\)"),
        (SPEC, anything, "ask it as text, or ask another model"),
    ):
        with pytest.raises(InputError, match=says.replace("many?'", "many\\?'")):
            check_vocabulary(spec, [asked])
