"""Recipes: everything that decides which tokens come out, and how answers are made from them.

A recipe is frozen, checks itself when it is made, and derives every token count in one place; its fingerprint stands
on each row made by it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import ADDED, fingerprint, known_fields, raised, spec_of
from longvlm.schemas.tower import TOWER_SETTINGS, TowerSpec

Precision = Literal["float32", "bfloat16", "float16"]
Decode = Literal["exact", "keyframe"]
TokenDtype = Literal["float16", "int8"]
Focus = Literal["question", "even", "auto"]
METRIC_HEADS = 16  # LONGVLM.md section 1: the head count of the merge metric, whatever the tower has
CHANNELS_PER_SCALE = 64  # of a local token as int8; of a width that is no multiple the last scale has fewer

# What decides, beside their fields, what recipes give; schemas/fingerprint.py says when to raise a number.
INDEX_RULES = {
    "sampling": 1,  # which frames make a segment, and which segments a video has
    "resizing": 1,  # from a decoded frame to the tower's input
    "merging": 1,  # from a segment's patch tokens to its local ones, and from CLS tokens to global ones
}
# By which rule frames are taken at times, as each row of `videos` says: null, by even spread; 2, by presentation time
# stamps. Not hashed, because it changed nothing for constant rates; `pipeline/store/changes.py` tells them apart.
TIME_RULE = 2
ANSWER_RULES = {
    "budgets": 1,  # how stored tokens are merged on or left out
    "prompts": 1,  # the words around a question of each type
    "decoding": 1,  # how options are weighed, and how words are drawn
    "reading": 1,  # from the words of an answer to its value; evidence alone makes no answer stale
}
# The same for answers of one focus alone: which segments a question keeps, and what becomes of the others.
FOCUS_RULES = {
    "question": 2,  # 2: all other segments are merged to a few tokens, where some were shown and others left out
    "auto": 1,  # the same, and when a question is about a moment; raise it together with the one above
}
# The same for answers of one type alone. These stand in the hash of a question, so that others stay as they are.
TYPE_RULES = {
    "number": 2,  # 2: decoded by a grammar, never asked for once more
    "json": 2,  # 2: as numbers
}


def channel_bytes(dim: int, dtype: TokenDtype) -> int:
    """What the channels of a local token take: two bytes each, or one and a float16 scale for every 64."""
    return 2 * dim if dtype == "float16" else dim + 2 * -(-dim // CHANNELS_PER_SCALE)


def halving_schedule(num_tokens: int, keep: int) -> tuple[int, ...]:
    """The merge steps that take a segment from `num_tokens` to `keep`: halve while possible, then the rest.

    Each step merges r tokens away, at most half of them (LONGVLM.md section 4); 2560 to 30 gives the paper's schedule.
    """
    steps = []
    while num_tokens > keep:
        steps.append(min(num_tokens // 2, num_tokens - keep))
        num_tokens -= steps[-1]
    return tuple(steps)


def tokens_after(num_tokens: int, schedule: tuple[int, ...]) -> int:
    """How many tokens a merge schedule leaves, each step capped at half of what there is."""
    for step in schedule:
        num_tokens -= min(step, num_tokens // 2)
    return num_tokens


@dataclass(frozen=True)
class IndexRecipe:
    """How a video becomes tokens. Build one with `paper`, `long`, `tiny` or `from_spec`."""

    name: str
    tower: TowerSpec
    sampling: Literal["uniform", "interval", "spread"]
    frames_per_segment: int
    tokens_per_segment: int
    num_segments: int | None = None  # uniform: segments per video
    segment_s: float | None = None  # interval: seconds per segment
    merge_schedule: tuple[int, ...] | None = None  # None: derived by halving
    feature_layer: int = -2  # index into the tower's hidden states (LONGVLM.md section 3)
    num_global_layers: int = 5
    decode: Decode = "exact"
    resize: Literal["decoder", "nearest"] = "decoder"  # nearest: the reference's, row for row
    precision: Precision = "bfloat16"
    max_frames: int | None = field(default=None, metadata=ADDED)  # spread: most frames per video
    frames_per_s: float | None = field(default=None, metadata=ADDED)  # spread: of videos that have no more than that
    skip_ends_s: float = field(default=0.0, metadata=ADDED)  # spread: left out at either end of those that have more
    dtype: TokenDtype = field(default="float16", metadata=ADDED)  # in which local tokens are stored

    def __post_init__(self) -> None:
        """Refuse, in a sentence, a recipe that cannot be carried out."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"recipe {self.name}: {name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}."
                )
        self._check_sampling()
        if self.resize == "nearest" and not self.tower.takes_squares:
            raise InputError(
                f"recipe {self.name}: resize nearest is the reference's, which makes squares and keeps no aspect, and "
                f"the tower {self.tower.name} takes others; leave resize out."
            )
        self._check_merge()
        if self.tower.metric_dim % METRIC_HEADS:
            raise InputError(
                f"recipe {self.name}: the tower {self.tower.name} is {self.tower.metric_dim} wide and merging needs a "
                f"multiple of {METRIC_HEADS}; choose another tower."
            )
        available = self.tower.num_layers + 1 if self.tower.has_cls else 0
        if not 0 <= self.num_global_layers <= available:
            raise InputError(
                f"recipe {self.name}: num_global_layers is {self.num_global_layers}, but the tower {self.tower.name} "
                f"has {available} layers with a CLS token; use at most that."
            )

    def _check_sampling(self) -> None:
        spans = {name: getattr(self, name) for names in _SPANS.values() for name in names}
        given = {name for name, value in spans.items() if value}
        if given != set(_SPANS[self.sampling]) or (self.skip_ends_s and self.sampling != "spread"):
            raise InputError(
                f"recipe {self.name}: uniform sampling takes num_segments, interval sampling takes segment_s, and "
                "spread sampling takes max_frames and frames_per_s, and skip_ends_s if it is to; got "
                f"{', '.join(f'{name}={value}' for name, value in spans.items())}, skip_ends_s={self.skip_ends_s}."
            )
        numbers = {name: getattr(self, name) for name in ("frames_per_segment", "tokens_per_segment", *sorted(given))}
        if min(numbers.values()) <= 0 or self.skip_ends_s < 0:
            raise InputError(f"recipe {self.name}: frames, tokens, segments and seconds must all be positive.")
        for name, value in (*numbers.items(), ("skip_ends_s", self.skip_ends_s)):
            if not (math.isfinite(value) if name.endswith("_s") else type(value) is int):
                kind = "a number of finite size" if name.endswith("_s") else "a whole number"
                raise InputError(f"recipe {self.name}: {name} is {value!r}; write {kind}.")

    def _check_merge(self) -> None:
        if self.tokens_per_segment > self.patches_per_segment:
            raise InputError(
                f"recipe {self.name}: asks for {self.tokens_per_segment} tokens a segment, but "
                f"{self.frames_per_segment} frames only give {self.patches_per_segment} patches."
            )
        reached = tokens_after(self.patches_per_segment, self.schedule_for(self.patches_per_segment))
        if reached != self.tokens_per_segment:
            raise InputError(
                f"recipe {self.name}: asks for {self.tokens_per_segment} tokens a segment, but its merge_schedule ends "
                f"at {reached}; set tokens_per_segment to {reached} or leave merge_schedule out to have it derived."
            )

    @property
    def shown(self) -> Literal["decoder", "nearest", "letterbox"]:
        """How the decoder makes a frame the size that the tower takes."""
        return "letterbox" if self.tower.aspect == "letterbox" else self.resize

    @property
    def patches_per_segment(self) -> int:
        """Tokens of a full segment before merging."""
        return self.tower.num_pictures(self.frames_per_segment) * self.tower.num_patches

    @property
    def num_frames(self) -> int | None:
        """Frames per video under uniform sampling; None where it follows from the length."""
        return self.num_segments * self.frames_per_segment if self.num_segments else None

    @property
    def num_visual_tokens(self) -> int | None:
        """Rows of the prefix, global first: 305 for the paper. None where it follows from the length."""
        return self.num_global_layers + self.num_segments * self.tokens_per_segment if self.num_segments else None

    def schedule_for(self, num_tokens: int, at_most: int | None = None) -> tuple[int, ...]:
        """Merge steps for a segment of `num_tokens`; the last segment of a video may be shorter than the others.

        `at_most` is how many tokens there is something to say with, should that be fewer than the recipe keeps.
        """
        keep = min(self.tokens_per_segment, at_most or num_tokens)
        if self.merge_schedule is not None and (num_tokens, keep) == (
            self.patches_per_segment,
            self.tokens_per_segment,
        ):
            return self.merge_schedule
        return halving_schedule(num_tokens, keep)

    def most_tokens(self, num_distinct: int) -> int:
        """Most tokens that a segment with so many distinct pictures keeps: no more than their patches.

        But the reference repeats the frames of short videos, and keeps all its tokens of them.
        """
        if self.sampling == "uniform":
            return self.tokens_per_segment
        return min(self.tokens_per_segment, num_distinct * self.tower.num_patches)

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes the tokens; not with the recipe's name or the folder the tower lies in."""
        spec = self.spec()
        del spec["name"], spec["tower"]["name"]
        spec["merge_schedule"] = self.schedule_for(self.patches_per_segment)
        return fingerprint(spec | raised(INDEX_RULES))

    def spec(self) -> dict[str, Any]:
        """The recipe as JSON-able values; `from_spec` reads it back."""
        return spec_of(self)


_SPANS = {  # the fields that each sampling takes, and the others do not
    "uniform": ("num_segments",),
    "interval": ("segment_s",),
    "spread": ("max_frames", "frames_per_s"),
}
_CHOICES = {
    "sampling": tuple(_SPANS),
    "decode": ("exact", "keyframe"),
    "resize": ("decoder", "nearest"),
    "precision": ("float32", "bfloat16", "float16"),
    "dtype": ("float16", "int8"),
}


def from_spec(spec: dict[str, Any]) -> IndexRecipe:
    """A recipe from what `IndexRecipe.spec` gave, also after a trip through JSON, in this version or an older one.

    Raises:
        InputError: a newer version wrote it, and it sets what is not known here.
    """
    tower = TowerSpec(**{name: _frozen(value) for name, value in known_fields(TowerSpec, spec["tower"]).items()})
    settings = {name: _frozen(value) for name, value in known_fields(IndexRecipe, spec).items()}
    return IndexRecipe(**{**settings, "tower": tower})


def _frozen(value: Any) -> Any:
    """A value as recipes hold it: JSON and TOML have lists where they have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _global_layers(tower: TowerSpec) -> int:
    """The last five layers have global tokens (LONGVLM.md section 1), where the tower has a CLS token at all."""
    return min(5, tower.num_layers + 1) if tower.has_cls else 0


def paper(tower: TowerSpec) -> IndexRecipe:
    """The reference's 100 frames in 10 segments of 30 tokens and 5 global tokens (arXiv 2404.03384, section 3)."""
    return IndexRecipe(
        name="paper",
        tower=tower,
        sampling="uniform",
        num_segments=10,
        frames_per_segment=10,
        tokens_per_segment=30,
        num_global_layers=_global_layers(tower),
    )


def long(tower: TowerSpec) -> IndexRecipe:
    """The default, for any length: a segment every 10 s, one frame a second, 80 tokens kept a segment."""
    return IndexRecipe(
        name="long",
        tower=tower,
        sampling="interval",
        segment_s=10.0,
        frames_per_segment=10,
        tokens_per_segment=80,
        num_global_layers=_global_layers(tower),
    )


def tiny(tower: TowerSpec) -> IndexRecipe:
    """For clips of seconds and towers of a few patches: a segment every 2 s, two frames a second, in float32."""
    return IndexRecipe(
        name="tiny",
        tower=tower,
        sampling="interval",
        segment_s=2.0,
        frames_per_segment=4,
        tokens_per_segment=8,
        num_global_layers=_global_layers(tower),
        precision="float32",
    )


RECIPES: dict[str, Callable[[TowerSpec], IndexRecipe]] = {"paper": paper, "long": long, "tiny": tiny}


def from_settings(settings: dict[str, Any], tower: TowerSpec) -> IndexRecipe:
    """A recipe from a user's file: `base` names one of `RECIPES` (default long), other keys override its fields."""
    settings = dict(settings)
    base = settings.pop("base", "long")
    if base not in RECIPES:
        raise InputError(f"the recipe's base {base!r} is not known; use one of {', '.join(RECIPES)}.")
    allowed = {one.name for one in fields(IndexRecipe)} - {"tower"}
    if unknown := sorted(set(settings) - allowed - TOWER_SETTINGS):
        raise InputError(
            f"the recipe sets {', '.join(unknown)}, which no recipe has; it may set "
            f"{', '.join(sorted(allowed | TOWER_SETTINGS))}."
        )
    settings = {name: _frozen(value) for name, value in settings.items()}
    tower = tower.shown(settings.pop("patch_grid", None), settings.pop("aspect", None))
    if "sampling" in settings:  # a base's own span setting does not survive a change of sampling
        settings = {"num_segments": None, "segment_s": None, **settings}
    try:
        return replace(RECIPES[base](tower), **{"name": "custom", **settings})
    except TypeError as error:
        raise InputError(
            f"the recipe has a value of the wrong type ({error}); numbers must be written without quotes."
        ) from error


@dataclass(frozen=True)
class AnswerRecipe:
    """How an answer is made: the model, its prompt template and the decoding; its fingerprint stands on each answer."""

    model: str  # as the user named it
    weights: str  # fingerprint of the language model's and projector's weights
    index_recipe: str  # fingerprint of the tokens answered from
    template: str = "long_vlm_v1"
    precision: Precision = "bfloat16"
    budget: int | None = None  # most visual tokens of a prefix, global ones included; None: as many as are stored
    tokens_per_segment: int | None = None  # most local tokens of a segment; None: as many as are stored
    focus: Focus | None = None  # what gives way to the budget; None: not even a token a segment, such a video fails
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 0

    @property
    def decoding(self) -> str:
        """How words are chosen, for people: `greedy`, or what sampling was told."""
        if not self.temperature:
            return "greedy"
        return f"temperature {self.temperature}, top_p {self.top_p}, seed {self.seed}"

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change an answer; not with the folder the model lies in."""
        spec = spec_of(self)
        del spec["model"]
        of_focus = {f"focus {self.focus}": FOCUS_RULES[self.focus]} if self.focus in FOCUS_RULES else {}
        return fingerprint(spec | raised(ANSWER_RULES | of_focus))
