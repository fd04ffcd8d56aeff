import pytest

from longvlm.schemas.errors import InputError
from longvlm.schemas.training import RECIPES, from_settings, from_spec, full, lora, projector


def test_the_projector_stage_is_the_reference_s():
    recipe = projector()
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_videos, recipe.warmup_ratio) == (2e-5, 3, 32, 0.03)
    assert (recipe.betas, recipe.eps, recipe.clip_norm, recipe.weight_decay) == ((0.9, 0.999), 1e-8, 1.0, 0.0)
    assert (recipe.max_length, recipe.save_every_steps, recipe.keep_checkpoints) == (2048, 3000, 3)


@pytest.mark.parametrize("make", RECIPES.values())
def test_recipes_survive_json(make):
    recipe = make()
    assert from_spec({**recipe.spec(), "betas": list(recipe.betas)}) == recipe
    assert recipe.stage == recipe.name


def test_settings_override_a_base():
    recipe = from_settings({"base": "lora", "lora_rank": 4, "betas": [0.9, 0.95], "name": "mine"})
    assert (recipe.stage, recipe.lora_rank, recipe.betas, recipe.name) == ("lora", 4, (0.9, 0.95), "mine")
    assert from_settings({}).stage == "projector"


def test_the_fingerprint_is_of_what_changes_weights():
    named = from_settings({"base": "full", "name": "mine", "save_every_steps": 7, "keep_checkpoints": 1})
    assert named.fingerprint == full().fingerprint
    assert from_settings({"base": "full", "seed": 1}).fingerprint != full().fingerprint
    assert len({projector().fingerprint, full().fingerprint, lora().fingerprint}) == 3


def test_steps_follow_from_videos():
    recipe = from_settings({"batch_videos": 4, "epochs": 2})
    assert [recipe.num_steps(videos) for videos in (1, 4, 5)] == [2, 2, 4]
    assert from_settings({"batch_videos": 4, "epochs": 2, "max_steps": 3}).num_steps(100) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base": "whole"}, "base 'whole' is not known"),
        ({"rank": 3}, "sets rank, which none has"),
        ({"stage": "head"}, "stage is 'head'; use one of projector, full, lora"),
        ({"average": "video"}, "average is 'video'"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"epochs": 0}, "epochs is 0; it must be a whole number of at least 1"),
        ({"batch_videos": 1.5}, "batch_videos is 1.5; it must be a whole number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
        ({"learning_rate": "1e-3"}, "wrong type"),
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0; it must be at least 0 and less than 1"),
        ({"betas": [0.9]}, "AdamW has two"),
        ({"betas": [0.9, 1.0]}, "beta 2 is 1.0"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"batch_videos": 2, "accumulation": 3}, "a step has only 2 videos"),
        ({"base": "lora", "lora_targets": []}, "nothing to adapt"),
    ],
)
def test_recipes_that_cannot_be_carried_out_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        from_settings(settings)
