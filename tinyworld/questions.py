"""Questions about a scene with their true answers, of every kind; and captions of a frame for the tower.

Only what has one right answer is asked: of a thing's colour where no other has its shape, of a place in the frame where
it is clear of the borders between places.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longvlm.tinyworld.scenes import COLOURS, SEGMENT_S, SHAPES, Event, Scene, random_generator

KINDS = (
    "count", "camera", "scene", "what", "where", "motion", "after", "before", "first", "last", "colour", "shape",
    "exists", "caption",
)  # fmt: skip
CAMERA_ANSWERS = {
    "still": "it stays still",
    "left": "it pans to the left",
    "right": "it pans to the right",
    "zoom": "it zooms in",
}
PLACE_ANSWERS = {"meadow": "on a meadow", "desert": "in the desert", "sea": "by the sea", "night": "in the night"}
MOTION_ANSWERS = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "grows": "grows",
    "shrinks": "shrinks",
    "still": "stays still",
}
NUMBERS = ("zero", "one", "two", "three", "four")
_THIRDS = (1 / 3, 2 / 3)
_MIDDLE_Y = 0.64
_MARGIN = 0.04  # of the frame's side: nearer to a border nobody is asked where it is


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a video, its true answer, and the kind of question it is."""

    kind: str
    question: str
    answer: str
    event: Event | None = None  # the one event that the answer rests on, where there is one


def timestamp(segment: int) -> str:
    """The time stamp of a segment's beginning, as questions say it: 0:08."""
    minutes, seconds = divmod(segment * SEGMENT_S, 60)
    return f"{minutes}:{seconds:02}"


def place_of(event: Event, segment: int) -> str:
    """The place in the frame where an event's object is on the average of a segment."""
    x, y, _ = event.at(segment + 0.5)
    return f"{'upper' if y < _MIDDLE_Y else 'lower'} {('left', 'center', 'right')[third_of_width(x)]}"


def _is_clear(event: Event, segment: int) -> bool:
    """Whether the object is clear of borders between places then."""
    x, y, _ = event.at(segment + 0.5)
    return min(abs(x - border) for border in _THIRDS) >= _MARGIN and abs(y - _MIDDLE_Y) >= _MARGIN


def third_of_width(x: float) -> int:
    """The third of the frame's width that an x lies in, from the left: 0, 1 or 2."""
    return int(np.searchsorted(_THIRDS, x))


def with_article(thing: str) -> str:
    """A thing with its article: a red circle, an orange bar."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def caption(scene: Scene) -> str:
    """The caption of a scene: all that happens, in order."""
    return ", then ".join(f"{with_article(event.name)} {MOTION_ANSWERS[event.motion]}" for event in scene.events)


def all_questions(scene: Scene, random: np.random.Generator) -> list[SceneQuestion]:
    """All questions about a scene that have one right answer; things that are not there are drawn."""
    events = scene.events
    asked = [
        SceneQuestion("count", "how many objects appear?", NUMBERS[len(events)]),
        SceneQuestion("camera", "what does the camera do?", CAMERA_ANSWERS[scene.camera]),
        SceneQuestion("scene", "where does it take place?", PLACE_ANSWERS[scene.place]),
        SceneQuestion("first", "what appears first?", with_article(events[0].name)),
        SceneQuestion("last", "what appears last?", with_article(events[-1].name)),
        SceneQuestion("caption", "what happens in the video?", caption(scene)),
    ]
    for segment in range(scene.num_segments):
        event = scene.event_at(segment)
        asked.append(SceneQuestion("what", f"what is seen at {timestamp(segment)}?", with_article(event.name), event))
        if _is_clear(event, segment):
            asked.append(
                SceneQuestion("where", f"where is the object at {timestamp(segment)}?", place_of(event, segment), event)
            )
    asked += [
        SceneQuestion("motion", f"how does the {e.name} move?", f"it {MOTION_ANSWERS[e.motion]}", e) for e in events
    ]
    for earlier, later in pairwise(events):
        asked.append(SceneQuestion("after", f"what comes after the {earlier.name}?", with_article(later.name)))
        asked.append(SceneQuestion("before", f"what comes before the {later.name}?", with_article(earlier.name)))
    for kind, of, by in (("colour", "colour", "shape"), ("shape", "shape", "colour")):
        known = [getattr(event, by) for event in events]
        unique = [event for event in events if known.count(getattr(event, by)) == 1]
        words = "what color is the {}?" if kind == "colour" else "what shape is the {} object?"
        asked += [SceneQuestion(kind, words.format(getattr(event, by)), getattr(event, of), event) for event in unique]
    return asked + _existence_questions(events, random)


def _existence_questions(events: tuple[Event, ...], random: np.random.Generator) -> list[SceneQuestion]:
    """As many things that are there as things that are not; half of these mix a colour and a shape that are."""
    there = {(event.colour, event.shape) for event in events}
    mixed = [(a.colour, b.shape) for a in events for b in events if (a.colour, b.shape) not in there]
    others = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in there]
    asked = []
    for number, event in enumerate(events):
        pool = mixed if number % 2 == 0 and mixed else others
        colour, shape = pool[random.integers(len(pool))]
        asked.append(SceneQuestion("exists", f"is there {with_article(event.name)}?", "yes"))
        asked.append(SceneQuestion("exists", f"is there {with_article(f'{colour} {shape}')}?", "no"))
    return asked


def draw_questions(
    scene: Scene, seed: int, number: int, per_kind: Mapping[str, int] | None = None
) -> list[SceneQuestion]:
    """Draw questions about video `number` of a seed from all there are: one of each kind, or up to `per_kind`."""
    random = random_generator(seed, number, purpose=1)
    pool = all_questions(scene, random)
    drawn = []
    for kind in KINDS:
        of_kind = [question for question in pool if question.kind == kind]
        chosen = random.permutation(len(of_kind))[: (per_kind or {}).get(kind, 1)]
        drawn += [of_kind[i] for i in chosen]
    return drawn


def describe_frame(scene: Scene, segment: float) -> str:
    """The caption of one frame, for search: a red circle on a meadow."""
    return f"{with_article(scene.event_at(int(segment)).name)} {PLACE_ANSWERS[scene.place]}"
