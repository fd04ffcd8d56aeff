"""The model card of a trained model: how it came to be."""

import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from longvlm.schemas.training import TrainRecipe

CARD = "README.md"
_PACKAGES = ("longvlm-index", "torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True)
class ModelCard:
    """A model card: what a reader of a trained model wants to know; no weight depends on it."""

    model: str  # what was trained, as the user named it
    recipe: TrainRecipe
    num_steps: int
    final_loss: float
    data: dict[str, Any] = field(default_factory=dict)  # where it came from: store, versions, hashes, counts

    def as_markdown(self) -> str:
        """The card as Markdown; the recipe is TOML that `longvlm train --recipe` reads."""
        packages = "\n".join(f"* {name} {found}" for name in _PACKAGES if (found := _version(name)))
        facts = "\n".join(f"* {name.replace('_', ' ')}: {value}" for name, value in self.data.items())
        return (
            f"# Trained on stored tokens\n\n"
            f"`{self.model}` after {self.num_steps} steps of the stage {self.recipe.stage}, seed {self.recipe.seed}; "
            f"the loss of the last step was {self.final_loss:.4f}.\n\n"
            f"## Recipe {self.recipe.fingerprint}\n\n```toml\n{as_toml(self.recipe)}```\n\n"
            f"## Data\n\n{facts or '* not noted'}\n\n## Made with\n\n{packages}\n"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # of an extra
        return None


def as_toml(recipe: TrainRecipe) -> str:
    """A recipe as the file that gives it back."""
    settings = {"base": recipe.stage, **recipe.spec()}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    # JSON's strings, numbers, lists and truth values are TOML's too; nothing is a key that is not there
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)
