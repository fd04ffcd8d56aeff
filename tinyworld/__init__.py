"""A procedural video benchmark, the tiny world: its videos, its questions, and the small model trained on it."""

from pathlib import Path

WORLD_VERSION = 1  # of everything that decides what a seed shows and asks; raised whenever any of that changes
MODEL = str(Path(__file__).parent / "model")  # a LongVLM folder, its tower beside it
RECIPE = str(Path(__file__).parent / "recipe.toml")  # how the model wants its videos indexed
VERSION_FIELD = "tinyworld_version"  # in the config.json of a model: the world it was trained on
