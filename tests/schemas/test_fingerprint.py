"""Fingerprints stand on every row of every store: those of 0.1.0 are written out here, and stay."""

import json
from dataclasses import dataclass, field, replace

import pytest

from longvlm.schemas import recipe, training
from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import ADDED
from longvlm.schemas.recipe import AnswerRecipe, IndexRecipe, long, paper, tiny
from longvlm.schemas.tower import TowerSpec
from longvlm.schemas.training import TrainRecipe

CLIP_L = TowerSpec("clip", "w0", 24, (16, 16), 1024, 224, has_cls=True, search_dim=768)
SIGLIP = TowerSpec("siglip", "w1", 27, (27, 27), 1152, 384, has_cls=False, search_dim=1152)
SCHEDULE_A = (1280, 640, 320, 160, 80, 40, 10)
SCHEDULE_B = (2880, 1440, 720, 360, 180, 90, 40)
ANSWER = AnswerRecipe(model="m", weights="w0", index_recipe="0123456789abcdef")


@dataclass(frozen=True)
class NewerTower(TowerSpec):
    registers: int = field(default=0, metadata=ADDED)


@dataclass(frozen=True)
class NewerIndex(IndexRecipe):
    overlap_s: float | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class NewerAnswer(AnswerRecipe):
    thinks: bool = field(default=False, metadata=ADDED)


@dataclass(frozen=True)
class NewerTraining(TrainRecipe):
    mixture: tuple[float, ...] = field(default=(1.0,), metadata=ADDED)


NEWER = [
    (NewerIndex, long(CLIP_L), {"overlap_s": 1.0}),
    (NewerAnswer, ANSWER, {"thinks": True}),
    (NewerTraining, training.lora(), {"mixture": (0.5, 0.5)}),
]
TABLES_OF_RULES = [
    (recipe.INDEX_RULES, long(CLIP_L)),
    (recipe.ANSWER_RULES, ANSWER),
    (training.TRAIN_RULES, training.full()),
]


def values(of) -> dict:
    return {name: getattr(of, name) for name in of.__dataclass_fields__}


@pytest.mark.parametrize(
    ("of", "fingerprint"),
    [
        (paper(CLIP_L), "8e797bcd6b2b8716"),
        (long(CLIP_L), "91b2bafc418b8a54"),
        (tiny(CLIP_L), "7aa5739ef9889feb"),
        (paper(SIGLIP), "e2134174133b9520"),
        (long(SIGLIP), "9818f41989fa6cd8"),
        (tiny(SIGLIP), "776a3b8b95ac2150"),
        (replace(long(CLIP_L), decode="keyframe"), "26209da0feb66142"),
        (replace(paper(CLIP_L), merge_schedule=SCHEDULE_A), "8e797bcd6b2b8716"),
        (replace(paper(CLIP_L), merge_schedule=SCHEDULE_B, tokens_per_segment=20), "118919667fbf6f32"),
        (replace(paper(CLIP_L), resize="nearest", precision="float16"), "7f1f8e08da922aa2"),
        (replace(long(CLIP_L), feature_layer=-1, num_global_layers=0), "c1093b195cb56db6"),
        (replace(long(replace(CLIP_L, search_dim=None)), segment_s=2.5), "79c09b7faba2f726"),
        (ANSWER, "3d2096b98546fd40"),
        (replace(ANSWER, template="vicuna_v1"), "57ed84dfc7cd55bc"),
        (replace(ANSWER, precision="float32"), "f85a234d55eae444"),
        (replace(ANSWER, budget=300), "45ffc8392e2d3c50"),
        (replace(ANSWER, tokens_per_segment=8, focus="even"), "85c7c87cf1d42e8f"),
        (replace(ANSWER, max_new_tokens=64, temperature=0.7, top_p=0.9, seed=3), "9aea3db15b1bf990"),
        (training.projector(), "4c22590b3cbfca2f"),
        (training.full(), "4e312b7e348081a5"),
        (training.lora(), "4fca68a16adc94cf"),
        (replace(training.full(), seed=1, betas=(0.9, 0.95)), "00a8ccd12260a2a2"),
        (
            replace(
                training.lora(),
                lora_rank=4,
                whiten=True,
                average="answer",
                tokens_per_segment=8,
                max_steps=10,
                template="vicuna_v1",
            ),
            "04f90fa63f9e834e",
        ),
    ],
)
def test_the_fingerprints_of_the_first_version_stay(of, fingerprint):
    assert of.fingerprint == fingerprint


@pytest.mark.parametrize(("newer", "old"), [case[:2] for case in NEWER])
def test_a_new_field_at_its_default_changes_nothing(newer, old):
    again = newer(**values(old))
    assert again.fingerprint == old.fingerprint
    if not isinstance(again, AnswerRecipe):  # which is never stored as a spec
        assert again.spec() == old.spec()


@pytest.mark.parametrize(("newer", "old", "changes"), NEWER)
def test_a_new_field_that_is_set_changes_the_fingerprint(newer, old, changes):
    again = newer(**values(old), **changes)
    assert again.fingerprint != old.fingerprint
    if not isinstance(again, AnswerRecipe):
        assert again.spec() == {**old.spec(), **changes}


def test_a_new_field_of_a_tower_is_a_field_of_its_recipe():
    plain, other = NewerTower(**values(CLIP_L)), NewerTower(**values(CLIP_L), registers=4)
    assert long(plain).fingerprint == long(CLIP_L).fingerprint
    assert long(plain).spec() == long(CLIP_L).spec()
    assert long(other).fingerprint != long(CLIP_L).fingerprint
    assert long(other).spec()["tower"]["registers"] == 4


@pytest.mark.parametrize(("rules", "of"), TABLES_OF_RULES)
def test_each_rule_is_hashed_from_its_second_number_on(rules, of, monkeypatch):
    seen = {of.fingerprint}
    for name in list(rules):
        for number in (2, 3):
            with monkeypatch.context() as patched:
                patched.setitem(rules, name, number)
                seen.add(of.fingerprint)
    assert len(seen) == 1 + 2 * len(rules)
    before = of.fingerprint
    monkeypatch.setitem(rules, "a rule that is new", 1)
    assert of.fingerprint == before


def test_rules_of_one_focus_are_hashed_of_answers_with_that_focus_alone(monkeypatch):
    of = {focus: replace(ANSWER, budget=300, focus=focus) for focus in (None, "even", "question", "auto")}
    before = {focus: answer.fingerprint for focus, answer in of.items()}
    assert before["question"] != "464cf8a765dbd2ea"  # as it was by its first rule
    for focus in recipe.FOCUS_RULES:
        with monkeypatch.context() as patched:
            patched.setitem(recipe.FOCUS_RULES, focus, 9)
            assert [name for name, answer in of.items() if answer.fingerprint != before[name]] == [focus]
    monkeypatch.setitem(recipe.FOCUS_RULES, "question", 1)
    assert of["question"].fingerprint == "464cf8a765dbd2ea"


def test_rules_of_one_type_leave_the_fingerprints_of_recipes_alone(monkeypatch):
    before = ANSWER.fingerprint
    for kind in recipe.TYPE_RULES:
        monkeypatch.setitem(recipe.TYPE_RULES, kind, 9)
    assert ANSWER.fingerprint == before


@pytest.mark.parametrize(
    ("read", "spec"),
    [(recipe.from_spec, long(CLIP_L).spec()), (training.from_spec, training.lora().spec())],
    ids=["index", "train"],
)
def test_a_spec_of_an_older_version_is_read_and_one_of_a_newer_is_refused(read, spec):
    spec = json.loads(json.dumps(spec))
    whole = read(spec)
    assert read({name: value for name, value in spec.items() if name != "precision"}) == whole  # as if added since
    with pytest.raises(InputError, match=r"sets overlap_s, which .* by a newer longvlm; upgrade"):
        read({**spec, "overlap_s": 1.0})


def test_a_tower_of_a_newer_version_is_refused():
    spec = long(CLIP_L).spec()
    with pytest.raises(InputError, match="sets registers, which this version does not know"):
        recipe.from_spec({**spec, "tower": {**spec["tower"], "registers": 4}})
