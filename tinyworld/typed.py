"""Typed questions about a scene: what its questions as text ask, with answers of type bool, choice or number.

A bool states an answer and asks whether it is so. A choice offers the right answer among wrong ones, in one of the ways
in which people write choices: whole, without articles, or as a single word. A number is a count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longvlm.schemas.tables import TypedQuestion
from longvlm.tinyworld.questions import (
    CAMERA_ANSWERS,
    KINDS,
    MOTION_ANSWERS,
    NUMBERS,
    PLACE_ANSWERS,
    SceneQuestion,
    all_questions,
    with_article,
)
from longvlm.tinyworld.scenes import COLOURS, SHAPES, Scene, random_generator

TYPED_KINDS = {  # what is asked of each type; captions are only ever told
    "bool": tuple(kind for kind in KINDS if kind != "caption"),
    "choice": tuple(kind for kind in KINDS if kind != "caption"),
    "number": ("count",),
}
MOST_CHOICES = 8
_THINGS = tuple(with_article(f"{colour} {shape}") for colour in COLOURS for shape in SHAPES)
_MOTIONS = {f"it {answer}": motion for motion, answer in MOTION_ANSWERS.items()}
_CAMERAS = {answer: camera for camera, answer in CAMERA_ANSWERS.items()}
_PLACES = {answer: place for place, answer in PLACE_ANSWERS.items()}
_COUNTS = {word: str(count) for count, word in enumerate(NUMBERS)}
_ANSWERS: dict[str, tuple[str, ...]] = {  # all that a kind of question can have
    "count": tuple(_COUNTS),
    "camera": tuple(_CAMERAS),
    "scene": tuple(_PLACES),
    "where": tuple(f"{row} {column}" for row in ("upper", "lower") for column in ("left", "center", "right")),
    "motion": tuple(_MOTIONS),
    "colour": COLOURS,
    "shape": SHAPES,
    "exists": ("yes", "no"),
}
_SINGLE_WORDS = {"count": _COUNTS, "camera": _CAMERAS, "scene": _PLACES, "motion": _MOTIONS}


@dataclass(frozen=True)
class TypedSceneQuestion:
    """A question of a type about a video, its true answer as people write it, and the kind of question it is."""

    kind: str
    type: str  # text | bool | choice | number
    question: str
    answer: str
    choices: tuple[str, ...] | None = None

    def as_row(self) -> TypedQuestion:
        """The question as a question file has it."""
        choices = list(self.choices) if self.choices else None
        return {"question": self.question, "type": self.type, "choices": choices, "schema": None}

    @property
    def prompt(self) -> str:
        """What a model is asked."""
        from longvlm.pipeline.answering.typed import as_request  # PyTorch, which a world is made without

        return as_request(self.kind, self.as_row()).question


def draw_typed(
    scene: Scene,
    seed: int,
    number: int,
    per_type: Mapping[str, int] | None = None,
    statements: Mapping[str, int] | None = None,
) -> list[TypedSceneQuestion]:
    """Draw typed questions about video `number` of a seed.

    Args:
        scene: of the video.
        seed: of its world.
        number: which of its videos.
        per_type: of how many kinds each type asks; by default one question of every kind that has any.
        statements: how many more of type bool there are, by kind.
    """
    random = random_generator(seed, number, purpose=2)
    pool = all_questions(scene, random)
    drawn = []
    for kind_of_answer, kinds in TYPED_KINDS.items():
        asked = [kind for kind in kinds if any(question.kind == kind for question in pool)]
        if per_type is not None:
            asked = [asked[i] for i in random.permutation(len(asked))[: per_type.get(kind_of_answer, 0)]]
        for kind in asked:
            of_kind = [question for question in pool if question.kind == kind]
            question = of_kind[random.integers(len(of_kind))]
            drawn.append(_typed(kind_of_answer, question, scene, random))
    for kind, num_more in (statements or {}).items():
        of_kind = [question for question in pool if question.kind == kind]
        more = (of_kind[random.integers(len(of_kind))] for _ in range(num_more))
        drawn += [_typed("bool", question, scene, random) for question in more]
    return drawn


def _typed(kind_of_answer: str, asked: SceneQuestion, scene: Scene, random: np.random.Generator) -> TypedSceneQuestion:
    """One question as text, as one of a type."""
    kind, question, answer = asked.kind, asked.question, asked.answer
    if kind_of_answer == "number":
        return TypedSceneQuestion(kind, "number", question, _COUNTS[answer])
    if kind_of_answer == "choice":
        choices, right = _choices(asked, scene, random)
        return TypedSceneQuestion(kind, "choice", question, right, choices)
    if kind == "exists":
        return TypedSceneQuestion(kind, "bool", question, answer)
    is_true = bool(random.integers(2))
    said = answer if is_true else _wrong_answers(asked, scene, random)[0]
    return TypedSceneQuestion(kind, "bool", _statement(kind, question, said), "yes" if is_true else "no")


def _wrong_answers(asked: SceneQuestion, scene: Scene, random: np.random.Generator) -> list[str]:
    """All wrong answers in a random order; things that the video shows at another time come first half of the time."""
    pool = _ANSWERS.get(asked.kind, _THINGS)
    wrong = [pool[i] for i in random.permutation(len(pool)) if pool[i] != asked.answer]
    if asked.kind not in _ANSWERS and random.integers(2):
        shown = {with_article(event.name) for event in scene.events}
        wrong.sort(key=lambda answer: answer not in shown)
    return wrong


def _choices(asked: SceneQuestion, scene: Scene, random: np.random.Generator) -> tuple[tuple[str, ...], str]:
    """Two choices or more in a random order, and the right one."""
    wrong = _wrong_answers(asked, scene, random)
    num_choices = int(random.integers(2, min(len(wrong) + 1, MOST_CHOICES) + 1))
    answers = [asked.answer, *wrong[: num_choices - 1]]
    wordings = _wordings(asked.kind, answers)
    choices = wordings[random.integers(len(wordings))]
    if random.integers(4) == 0:
        choices = [choice.capitalize() for choice in choices]
    return tuple(choices[i] for i in random.permutation(num_choices)), choices[0]


def _wordings(kind: str, answers: Sequence[str]) -> list[list[str]]:
    """The ways to write some answers as choices: as they are, without article or pronoun, as a single word."""
    bare = [answer.removeprefix("it ").removeprefix("an ").removeprefix("a ") for answer in answers]
    ways = [list(answers), bare]
    if kind in _SINGLE_WORDS:
        ways.append([_SINGLE_WORDS[kind][answer] for answer in answers])
    return [way for i, way in enumerate(ways) if way not in ways[:i]]


def _statement(kind: str, question: str, answer: str) -> str:
    """The question whether an answer is the one to a question as text."""
    bare = question.removesuffix("?")
    if kind == "count":
        return "does one object appear?" if answer == "one" else f"do {answer} objects appear?"
    if kind == "camera":
        return f"does the camera {_infinitive(answer)}?"
    if kind == "motion":  # how does the red circle move
        return f"{bare.removeprefix('how ').removesuffix(' move')} {_infinitive(answer)}?"
    if kind == "what":  # what is seen at 0:08
        return f"is {answer} {bare.removeprefix('what is ')}?"
    if kind in ("first", "last", "after", "before"):  # what appears first, what comes after the red circle
        verb, _, rest = bare.removeprefix("what ").partition(" ")
        return f"does {answer} {verb.removesuffix('s')} {rest}?"
    told = {"where": f"in the {answer}", "shape": with_article(answer)}.get(kind, answer)
    return f"{bare[bare.index(_VERBS[kind]) :]} {told}?"


_VERBS = {"where": "is the", "scene": "does it", "colour": "is the", "shape": "is the"}


def _infinitive(answer: str) -> str:
    """What something does, after another verb: it zooms in, zoom in."""
    verb, _, rest = answer.removeprefix("it ").partition(" ")
    return " ".join(filter(None, (verb.removesuffix("s"), rest)))
