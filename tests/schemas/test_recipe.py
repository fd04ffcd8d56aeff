import json
import math
from dataclasses import replace

import pytest

from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import (
    RECIPES,
    AnswerRecipe,
    from_settings,
    from_spec,
    halving_schedule,
    long,
    paper,
    tiny,
    tokens_after,
)
from longvlm.schemas.tower import TowerSpec

CLIP_L = TowerSpec("clip", "w0", 24, (16, 16), 1024, 224, has_cls=True, search_dim=768)
SIGLIP = TowerSpec("siglip", "w1", 27, (27, 27), 1152, 384, has_cls=False, search_dim=1152)
SPREAD = {"sampling": "spread", "num_segments": None, "max_frames": 64, "frames_per_s": 1.0}
SCHEDULE_A = (1280, 640, 320, 160, 80, 40, 10)  # LONGVLM.md section 1
SCHEDULE_B = (2880, 1440, 720, 360, 180, 90, 40)


def test_paper_has_the_reference_counts():
    recipe = paper(CLIP_L)
    assert recipe.num_frames == 100
    assert recipe.patches_per_segment == 2560
    assert recipe.schedule_for(2560) == SCHEDULE_A
    assert recipe.num_visual_tokens == 305


def test_schedule_b_keeps_twenty():
    recipe = replace(paper(CLIP_L), merge_schedule=SCHEDULE_B, tokens_per_segment=20)
    assert recipe.num_visual_tokens == 205


def test_halving_reaches_every_count_exactly():
    for num_tokens in (1, 7, 63, 490, 2560):
        for keep in {1, 2, num_tokens // 3 or 1, num_tokens - 1 or 1, num_tokens}:
            assert tokens_after(num_tokens, halving_schedule(num_tokens, keep)) == min(keep, num_tokens)


def test_eighty_to_thirty_continues_the_stored_merge():
    assert halving_schedule(2560, 80) + halving_schedule(80, 30) == halving_schedule(2560, 30)


def test_a_short_last_segment_gets_its_own_schedule():
    assert tokens_after(3 * 256, long(CLIP_L).schedule_for(3 * 256)) == 80
    assert long(CLIP_L).schedule_for(64) == ()


def test_a_tower_without_cls_has_no_global_tokens():
    assert paper(SIGLIP).num_global_layers == 0
    assert paper(SIGLIP).num_visual_tokens == 300


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens_per_segment": 31, "merge_schedule": SCHEDULE_A}, "ends at 30; set tokens_per_segment to 30"),
        ({"tokens_per_segment": 3000}, "only give 2560"),
        ({"tokens_per_segment": 0}, "must all be positive"),
        ({"sampling": "random"}, "use one of uniform, interval"),
        ({"segment_s": 5.0}, "uniform sampling takes num_segments"),
        ({"num_global_layers": 26}, "has 25 layers with a CLS token"),
        ({"precision": "int8"}, "use one of float32, bfloat16, float16"),
        ({"dtype": "int4"}, "dtype is 'int4'; use one of float16, int8"),
        ({"tower": replace(CLIP_L, dim=1000)}, "multiple of 16"),
        ({"sampling": "spread"}, "spread sampling takes max_frames and frames_per_s"),
        ({"sampling": "spread", "num_segments": None, "max_frames": 64}, "got .*max_frames=64, frames_per_s=None"),
        ({"max_frames": 64}, "uniform sampling takes num_segments"),
        ({"skip_ends_s": 1.0}, "got num_segments=10, .*skip_ends_s=1.0"),
        ({**SPREAD, "skip_ends_s": -1.0}, "must all be positive"),
        ({**SPREAD, "frames_per_s": -1.0}, "must all be positive"),
        ({**SPREAD, "max_frames": 64.5}, "max_frames is 64.5; write a whole number"),
        ({**SPREAD, "frames_per_s": math.inf}, "frames_per_s is inf; write a number of finite size"),
        ({**SPREAD, "skip_ends_s": math.nan}, "skip_ends_s is nan; write a number of finite size"),
        ({"num_segments": 2.5}, "num_segments is 2.5; write a whole number"),
        ({"tokens_per_segment": 29.5}, "tokens_per_segment is 29.5; write a whole number"),
    ],
)
def test_an_impossible_recipe_is_refused_with_a_sentence(changes, says):
    with pytest.raises(InputError, match=says):
        replace(paper(CLIP_L), **changes)


@pytest.mark.parametrize("make", RECIPES.values())
@pytest.mark.parametrize("tower", [CLIP_L, SIGLIP], ids=["clip", "siglip"])
def test_a_recipe_survives_json(make, tower):
    recipe = make(tower)
    again = from_spec(json.loads(json.dumps(recipe.spec())))
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


def test_the_fingerprint_ignores_names_and_sees_everything_else():
    recipe = paper(CLIP_L)
    same = replace(recipe, name="other", tower=replace(CLIP_L, name="elsewhere"), merge_schedule=SCHEDULE_A)
    assert same.fingerprint == recipe.fingerprint
    for changes in (
        {"decode": "keyframe"},
        {"tower": replace(CLIP_L, weights="w9")},
        {"precision": "float32"},
        {"dtype": "int8"},
    ):
        assert replace(recipe, **changes).fingerprint != recipe.fingerprint


def test_settings_override_a_base():
    recipe = from_settings({"name": "dense", "tokens_per_segment": 160}, CLIP_L)
    assert recipe == replace(long(CLIP_L), name="dense", tokens_per_segment=160)
    spread = {
        "base": "tiny",
        "sampling": "uniform",
        "num_segments": 4,
        "merge_schedule": [512, 256, 128, 64, 32, 16, 8],
    }
    assert from_settings(spread, CLIP_L).num_visual_tokens == 37


def test_frames_may_be_spread_over_a_video():
    settings = {"sampling": "spread", "max_frames": 64, "frames_per_s": 1, "skip_ends_s": 1}
    recipe = from_settings(settings, SIGLIP)
    assert (recipe.num_segments, recipe.segment_s, recipe.num_frames, recipe.num_visual_tokens) == (None,) * 4
    assert from_spec(json.loads(json.dumps(recipe.spec()))) == recipe
    others = [from_settings({**settings, name: 2}, SIGLIP) for name in ("max_frames", "frames_per_s", "skip_ends_s")]
    assert len({one.fingerprint for one in (recipe, *others)}) == 4
    assert recipe.most_tokens(1) == 80
    assert replace(recipe, tokens_per_segment=800).most_tokens(1) == 729  # of a short video's only frame


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base": "huge"}, "use one of paper, long, tiny"),
        ({"tokens": 3}, "sets tokens, which no recipe has"),
        ({"tokens_per_segment": "many"}, "wrong type"),
    ],
)
def test_wrong_settings_are_refused_with_a_sentence(settings, says):
    with pytest.raises(InputError, match=says):
        from_settings(settings, CLIP_L)


def test_an_answer_recipe_is_known_by_what_it_does():
    recipe = AnswerRecipe(model="m", weights="w", index_recipe=tiny(CLIP_L).fingerprint)
    assert replace(recipe, model="moved").fingerprint == recipe.fingerprint
    assert replace(recipe, seed=1).fingerprint != recipe.fingerprint
