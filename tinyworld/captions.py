"""Timed captions of scenes: training data for the time marker of each segment, beside questions.

Finer than any question asks: how an object moves, and which event is next to which, has to be put together from several
segments, and is learnt sooner where each of them says its part. Each word means one thing.
"""

from longvlm.tinyworld.questions import place_of, third_of_width
from longvlm.tinyworld.scenes import FAR_X, HIGH_Y, LARGE, LOW_Y, NEAR_X, SEGMENT_S, SMALL, Scene

_MOTION_WORDS = {
    "left": "leftward",
    "right": "rightward",
    "up": "upward",
    "down": "downward",
    "grows": "growing",
    "shrinks": "shrinking",
    "still": "resting",
}
_COLUMNS = ("leftmost", "leftish", "halfleft", "halfright", "rightish", "rightmost")
_ROWS = ("topmost", "high", "level", "low", "bottom")
_SIZES = ("tiny", "small", "medium", "large", "huge")
_SIDES = ("west", "middle", "east")  # of the house
_WIDTHS = ("narrow", "normal", "broad")
_NARROW, _BROAD = 0.09, 0.24  # half of its width
_ORDINALS = ("opening", "second", "third", "fourth")  # of events


def timed_captions(scene: Scene) -> list[tuple[int, str]]:
    """The timed captions of a scene: from which second on, what each segment shows and which event came before."""
    told = []
    for segment in range(scene.num_segments):
        event = scene.event_at(segment)
        number = scene.events.index(event)
        x, y, radius = event.at(segment + 0.5)
        house_x, half = scene.house_at(segment + 0.5)
        words = [
            event.name,
            place_of(event, segment),
            _word(_COLUMNS, x, NEAR_X, FAR_X),
            _word(_ROWS, y, LOW_Y, HIGH_Y),
            _word(_SIZES, radius, SMALL, LARGE),
            _MOTION_WORDS[event.motion],
            _ORDINALS[number],
            *(f"former{word}" for word in scene.events[number - 1].name.split() if number),
            "house",
            _SIDES[third_of_width(house_x)],
            _word(_WIDTHS, half, _NARROW, _BROAD),
        ]
        told.append((segment * SEGMENT_S, " ".join(words)))
    return told


def _word(words: tuple[str, ...], value: float, low: float, high: float) -> str:
    """Which of evenly spread words says a value between two others."""
    return words[min(max(int((value - low) / (high - low) * len(words)), 0), len(words) - 1)]
