"""Training recipes: everything that decides how a model is trained on stored tokens, in one frozen value.

A recipe is one of `projector`, `full` and `lora`, or such a one with some fields of a user's own (`from_settings`).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pyarrow as pa

from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import fingerprint, known_fields, raised, spec_of

Stage = Literal["projector", "full", "lora"]
Average = Literal["token", "answer"]
_CHOICES = {
    "stage": ("projector", "full", "lora"),
    "precision": ("float32", "bfloat16"),
    "average": ("token", "answer"),
}
CONVERSATIONS = pa.schema(  # what is trained on: one row a conversation about a video
    [
        ("id", pa.string()),
        ("video", pa.string()),  # uri, external_id, path, a file's unique stem, or video_id
        ("turns", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
        ("at_s", pa.float64()),  # of a timed caption, which stands as the one answer, to no question; null otherwise
    ]
)
# What does not change the weights that come out.
_INDIFFERENT = ("name", "save_every_steps", "keep_checkpoints")
# What does, beside the fields; schemas/fingerprint.py says when to raise a number.
TRAIN_RULES = {
    "packing": 1,  # which videos make a step, and how their conversations are packed
    "learning": 1,  # losses, and what an optimizer makes of them
}


@dataclass(frozen=True)
class TrainRecipe:
    """How a model is trained. The defaults are the reference's hyper-parameters (LONGVLM.md section 7)."""

    name: str
    stage: Stage  # what is trained: the projector, all but the tower, or adapters of the LLM and the projector
    template: str | None = None  # of prompts; None: the model's own, which `answer` uses too
    epochs: int = 3
    max_steps: int | None = None  # ends earlier than the epochs would
    batch_videos: int = 32  # of a step, over all workers; each comes with all its conversations
    accumulation: int = 1  # parts of a step that are run one after the other, to save memory
    learning_rate: float = 2e-5
    projector_learning_rate: float | None = None  # None: as the rest
    warmup_ratio: float = 0.03  # of all steps: linear from 0, then a cosine to 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8
    clip_norm: float = 1.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"  # of arithmetic; what is trained is kept in float32
    gradient_checkpointing: bool = True
    max_length: int = 2048  # tokens of a packed sequence; the model's context holds as well
    lora_rank: int = 64
    lora_alpha: float = 128.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    average: Average = "token"  # answer: each answer counts the same, so that captions do not swamp single words
    whiten: bool = False  # train behind a PCA whitening of the tokens, and fold it into the projector when saving
    tokens_per_segment: int | None = None  # stored tokens are merged on to so many; None: as they are stored
    seed: int = 0
    save_every_steps: int = 3000
    keep_checkpoints: int = 3

    def __post_init__(self) -> None:
        """Refuse, in a sentence, a recipe that cannot be carried out."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                self._refuse(f"{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        self._check_numbers()
        if self.accumulation > self.batch_videos:
            self._refuse(
                f"accumulation is {self.accumulation}, but a step has only {self.batch_videos} videos; raise "
                "batch_videos or lower accumulation"
            )
        if self.stage == "lora" and not self.lora_targets:
            self._refuse("lora_targets is empty, so there is nothing to adapt; name linear layers such as q_proj")

    def _check_numbers(self) -> None:
        at_least_one = ("epochs", "batch_videos", "accumulation", "max_length", "lora_rank", "save_every_steps")
        for name in (*at_least_one, "keep_checkpoints", "max_steps", "tokens_per_segment"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                self._refuse(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("learning_rate", "projector_learning_rate", "eps", "clip_norm", "lora_alpha"):
            if (value := getattr(self, name)) is not None and not value > 0:
                self._refuse(f"{name} is {value}; it must be positive")
        shares = {"warmup_ratio": self.warmup_ratio, "lora_dropout": self.lora_dropout}
        if len(self.betas) != 2:
            self._refuse(f"betas are {self.betas}; AdamW has two")
        for name, share in {**shares, "beta 1": self.betas[0], "beta 2": self.betas[1]}.items():
            if not 0 <= share < 1:
                self._refuse(f"{name} is {share}; it must be at least 0 and less than 1")
        if self.weight_decay < 0:
            self._refuse(f"weight_decay is {self.weight_decay}; it must not be negative")

    def _refuse(self, what: str) -> None:
        raise InputError(f"training recipe {self.name}: {what}.")

    def num_steps(self, num_videos: int) -> int:
        """Steps of a whole run over so many videos; the last step of an epoch may have fewer of them."""
        steps = self.epochs * -(-num_videos // self.batch_videos)
        return min(steps, self.max_steps or steps)

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change the trained weights."""
        spec = {name: value for name, value in self.spec().items() if name not in _INDIFFERENT}
        return fingerprint(spec | raised(TRAIN_RULES))

    def spec(self) -> dict[str, Any]:
        """The recipe as JSON-able values; `from_spec` reads it back."""
        return spec_of(self)


def projector() -> TrainRecipe:
    """The reference's only stage: projector and the rows of two marks; the language model stays (LONGVLM.md, 7)."""
    return TrainRecipe("projector", "projector")


def full() -> TrainRecipe:
    """Projector and language model, every weight."""
    return TrainRecipe("full", "full")


def lora() -> TrainRecipe:
    """The projector, and low-rank adapters of the language model (arXiv 2106.09685), merged into it when saved.

    Adapters start at zero and learn at ten times the rate of whole weights.
    """
    return TrainRecipe("lora", "lora", learning_rate=2e-4, projector_learning_rate=2e-5)


RECIPES: dict[str, Callable[[], TrainRecipe]] = {"projector": projector, "full": full, "lora": lora}


def from_settings(settings: dict[str, Any]) -> TrainRecipe:
    """A recipe from a user's file: `base` names one of `RECIPES` (default projector), other keys override its fields.

    Raises:
        InputError: a key or value that no recipe has, or a recipe that cannot be carried out.
    """
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    base = settings.pop("base", "projector")
    if base not in RECIPES:
        raise InputError(f"the training recipe's base {base!r} is not known; use one of {', '.join(RECIPES)}.")
    allowed = {field.name for field in fields(TrainRecipe)}
    if unknown := sorted(set(settings) - allowed):
        raise InputError(
            f"the training recipe sets {', '.join(unknown)}, which none has; it may set {', '.join(sorted(allowed))}."
        )
    try:
        return replace(RECIPES[base](), **{"name": "custom", **settings})
    except TypeError as error:
        raise InputError(
            f"the training recipe has a value of the wrong type ({error}); numbers must be written without quotes."
        ) from error


def from_spec(spec: dict[str, Any]) -> TrainRecipe:
    """A recipe from what `TrainRecipe.spec` gave, also after a trip through JSON, in this version or an older one.

    Raises:
        InputError: a newer version wrote it, and it sets what is not known here.
    """
    known = known_fields(TrainRecipe, spec)
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    return TrainRecipe(**values)
