import tomllib

from longvlm.pipeline.training.card import ModelCard, as_toml
from longvlm.schemas.training import from_settings, full


def test_the_card_says_what_was_done_and_its_recipe_can_be_run_again():
    recipe = from_settings({"base": "lora", "name": "mine", "betas": [0.9, 0.95], "tokens_per_segment": 8})
    text = ModelCard("hub/name", recipe, 7, 0.25, {"store": "s3://x", "videos": 3}).as_markdown()
    assert all(
        said in text for said in ("`hub/name` after 7 steps", "0.2500", "store: s3://x", "videos: 3", "torch 2.")
    )
    assert from_settings(tomllib.loads(as_toml(recipe))) == recipe
    assert from_settings(tomllib.loads(as_toml(full()))) == full()
