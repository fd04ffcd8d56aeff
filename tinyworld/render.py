"""Rendering of scenes, to frames and to H.264 files."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvlm.tinyworld.scenes import SEGMENT_S, SKY, Scene

SIDE, FPS = 112, 4  # pixels, frames a second
Frame = NDArray[np.uint8]
Plane = NDArray[np.floating[Any]]

SKIES = {"meadow": (150, 200, 245), "desert": (245, 215, 185), "sea": (175, 185, 195), "night": (15, 18, 50)}
GROUNDS = {"meadow": (165, 215, 140), "desert": (215, 180, 120), "sea": (60, 110, 140), "night": (50, 45, 60)}
HOUSES = {"meadow": (120, 70, 50), "desert": (120, 70, 50), "sea": (90, 55, 45), "night": (200, 190, 150)}
PAINTS = {
    "red": (225, 25, 25),
    "green": (10, 130, 30),
    "blue": (25, 40, 235),
    "yellow": (250, 235, 20),
    "purple": (150, 30, 170),
    "orange": (255, 130, 10),
    "white": (255, 255, 255),
    "cyan": (10, 235, 235),
}
_CENTRES: Plane = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
_Y, _X = _CENTRES[:, None], _CENTRES[None, :]


def draw_frame(scene: Scene, segment: float) -> Frame:
    """Render a scene at a time (in segments since it began), RGB [SIDE, SIDE, 3]."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = GROUNDS[scene.place]
    canvas[: round(SKY * SIDE)] = SKIES[scene.place]
    x, half = scene.house_at(segment)
    _paint(canvas, _house(x, half), HOUSES[scene.place])
    event = scene.event_at(int(segment))
    x, y, radius = event.at(segment)
    _paint(canvas, _shape(event.shape, _X - x, _Y - y, radius), PAINTS[event.colour])
    return np.clip(canvas * scene.brightness, 0, 255).astype(np.uint8)


def pixel_masks(scene: Scene, segment: float) -> tuple[Plane, Plane, Plane]:
    """Segmentation masks of the object, the house and the sky, [SIDE, SIDE] each: 0 or 1, soft at edges."""
    x, half = scene.house_at(segment)
    event = scene.event_at(int(segment))
    object_x, object_y, radius = event.at(segment)
    depths = (
        _shape(event.shape, _X - object_x, _Y - object_y, radius),
        _house(x, half),
        SKY - _Y + 0 * _X,
    )
    planes = [np.clip(depth * SIDE + 0.5, 0, 1) for depth in depths]
    return planes[0], planes[1], planes[2]


def _house(x: float, half: float) -> Plane:
    height = 0.8 * half
    return _box(_X - x, _Y - (SKY - height), half, height)


def _paint(canvas: Plane, depth: Plane, colour: tuple[int, int, int]) -> None:
    """Cover what is inside (positive depth, in sides) with a colour, its edge one pixel soft."""
    cover = np.clip(depth * SIDE + 0.5, 0, 1)[..., None]
    canvas += cover * (np.array(colour, np.float32) - canvas)


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.minimum(half_width - np.abs(x), half_height - np.abs(y))


def _shape(name: str, x: Plane, y: Plane, radius: float) -> Plane:
    """How deep each pixel lies inside a shape around the origin; negative outside."""
    if name == "circle":
        return radius - np.hypot(x, y)
    if name == "ring":
        distance = np.hypot(x, y)
        return np.minimum(radius - distance, distance - 0.5 * radius)
    if name == "square":
        return _box(x, y, 0.88 * radius, 0.88 * radius)
    if name == "bar":
        return _box(x, y, 1.15 * radius, 0.42 * radius)
    if name == "cross":
        return np.maximum(_box(x, y, radius, 0.34 * radius), _box(x, y, 0.34 * radius, radius))
    sides = 0.89 * (radius + y) / 2 - 0.89 * np.abs(x) + 0.1 * radius  # a triangle that points up
    return np.minimum(sides, 0.85 * radius - y)


def write_video(path: Path, scene: Scene) -> None:
    """Encode a scene as an H.264 MP4 of FPS frames a second."""
    per_segment = SEGMENT_S * FPS
    times = ((number + 0.5) / per_segment for number in range(scene.num_segments * per_segment))
    write_h264(path, (draw_frame(scene, time) for time in times), FPS)


def write_h264(path: Path, frames: Iterable[Frame], fps: int) -> None:
    """Encode RGB frames [H, W, 3], even in both, as an H.264 MP4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "20", "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for number, frame in enumerate(frames):
            if number == 0:  # the codec opens with the first frame
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
