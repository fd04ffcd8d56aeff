"""Scenes of the tiny world, drawn by seed: what each video shows.

A scene is a place, a camera that stays, pans or zooms (a house in the sky band shows it), and two to four events, one
after the other. An event is one object that moves in one way for three to six segments, so that a model which sees
segments in order can tell how. All lengths are fractions of the frame's side, seen from its upper left corner.
"""

from dataclasses import dataclass

import numpy as np

from longvlm.tinyworld import WORLD_VERSION

SEGMENT_S = 2  # events begin and end with segments
PLACES = ("meadow", "desert", "sea", "night")
CAMERAS = ("still", "left", "right", "zoom")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "still")
SKY = 0.26  # the band above the ground, where no object comes and only the house stands
LOW_Y, HIGH_Y = 0.44, 0.84  # how far down an object's centre may be
NEAR_X, FAR_X = 0.16, 0.84
RADIUS, SMALL, LARGE = 0.15, 0.09, 0.22


@dataclass(frozen=True)
class Event:
    """An event of a scene: one object and what it does in `[start, end)`, counted in segments."""

    colour: str
    shape: str
    motion: str
    start: int
    end: int
    from_xyr: tuple[float, float, float]  # centre and radius when it begins ...
    to_xyr: tuple[float, float, float]  # ... and when it ends

    @property
    def name(self) -> str:
        """The object's name in questions and answers: red circle."""
        return f"{self.colour} {self.shape}"

    def at(self, segment: float) -> tuple[float, float, float]:
        """Centre and radius at a time, in segments since the video began."""
        progress = (segment - self.start) / (self.end - self.start)
        x, y, r = (a + (b - a) * progress for a, b in zip(self.from_xyr, self.to_xyr, strict=True))
        return x, y, r


@dataclass(frozen=True)
class Scene:
    """A scene: the contents of one video of the tiny world."""

    place: str
    camera: str
    events: tuple[Event, ...]
    house_from: tuple[float, float]  # x of its centre and half its width, when the video begins ...
    house_to: tuple[float, float]  # ... and when it ends
    brightness: float  # factor for all colours

    @property
    def num_segments(self) -> int:
        """The length, in segments of `SEGMENT_S` seconds."""
        return self.events[-1].end

    def event_at(self, segment: int) -> Event:
        """The event of a segment."""
        return next(event for event in self.events if segment < event.end)

    def house_at(self, segment: float) -> tuple[float, float]:
        """The house's centre and half width at a time, in segments."""
        progress = segment / self.num_segments
        x, half = (a + (b - a) * progress for a, b in zip(self.house_from, self.house_to, strict=True))
        return x, half


def random_generator(seed: int, number: int, purpose: int = 0) -> np.random.Generator:
    """The random number generator of one video of a seed: other videos and other worlds have others."""
    return np.random.default_rng([WORLD_VERSION, seed, number, purpose])


def draw_scene(seed: int, number: int) -> Scene:
    """Draw the scene of video `number` of a seed; each property is drawn evenly and by itself."""
    random = random_generator(seed, number)
    num_events = int(random.integers(2, 5))
    lengths = random.integers(3, {2: 7, 3: 5, 4: 4}[num_events], num_events)
    ends = np.cumsum(lengths)
    pairs = random.choice(len(COLOURS) * len(SHAPES), num_events, replace=False)
    events = tuple(
        _event(COLOURS[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)], int(end - length), int(end), random)
        for pair, length, end in zip(pairs, lengths, ends, strict=True)
    )
    camera = CAMERAS[random.integers(len(CAMERAS))]
    house_from, house_to = _house(camera, random)
    return Scene(
        PLACES[random.integers(len(PLACES))], camera, events, house_from, house_to, float(random.uniform(0.9, 1.05))
    )


def _event(colour: str, shape: str, start: int, end: int, random: np.random.Generator) -> Event:
    motion = MOTIONS[random.integers(len(MOTIONS))]
    x, y = random.uniform(NEAR_X, FAR_X), random.uniform(LOW_Y, HIGH_Y)
    near, far = NEAR_X + random.uniform(0, 0.08), FAR_X - random.uniform(0, 0.08)
    high, low = LOW_Y + random.uniform(0, 0.04), HIGH_Y - random.uniform(0, 0.04)
    first, last = {
        "left": ((far, y, RADIUS), (near, y, RADIUS)),
        "right": ((near, y, RADIUS), (far, y, RADIUS)),
        "up": ((x, low, RADIUS), (x, high, RADIUS)),
        "down": ((x, high, RADIUS), (x, low, RADIUS)),
        "grows": ((x, y, SMALL), (x, y, LARGE)),
        "shrinks": ((x, y, LARGE), (x, y, SMALL)),
        "still": ((x, y, RADIUS), (x, y, RADIUS)),
    }[motion]
    return Event(colour, shape, motion, start, end, first, last)


def _house(camera: str, random: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the house is at first and at last. A camera that pans to the right moves it to the left."""
    x, half = random.uniform(0.25, 0.75), 0.15
    near, far = 0.15 + random.uniform(0, 0.1), 0.85 - random.uniform(0, 0.1)
    return {
        "still": ((x, half), (x, half)),
        "left": ((near, half), (far, half)),
        "right": ((far, half), (near, half)),
        "zoom": ((x, 0.09), (x, 0.26)),
    }[camera]
