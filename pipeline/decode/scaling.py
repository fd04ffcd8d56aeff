"""Scaling of decoded frames: to small RGB ones by FFmpeg's bilinear scaler, to a shape in black, or to the nearest."""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.orientation import Orientation

Size = tuple[int, int]  # height and width, pixels


class Scaler:
    """FFmpeg's bilinear scaler, on one thread, for the frames of one video.

    Where colour is stored at half the width, its samples lie on every other pixel (as H.264 has it) or between two. By
    default the scaler goes by what a frame says. decord takes all to lie between: with `is_colour_between` pixels are
    bit for bit those of decord 0.6.
    """

    def __init__(self, *, is_colour_between: bool = False) -> None:
        from av.video.reformatter import VideoReformatter

        self.is_colour_between = is_colour_between
        self._swscale: Any = VideoReformatter()
        self._graph: tuple[tuple[Any, ...], Any] | None = None  # what frames it takes and gives, the graph

    def scale(self, frame: Any, size: Size) -> NDArray[np.uint8]:
        """A decoded frame as RGB of a size, [height, width, 3]."""
        height, width = size
        if self.is_colour_between:
            graph = self._graph_for(frame, size)
            graph.vpush(frame)
            small = graph.vpull()
        else:
            small = self._swscale.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        pixels: NDArray[np.uint8] = small.to_ndarray()
        return pixels

    def rgb(self, frame: Any) -> NDArray[np.uint8]:
        """A decoded frame as RGB of its own size, [height, width, 3]."""
        pixels: NDArray[np.uint8] = self._swscale.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return pixels

    def _graph_for(self, frame: Any, size: Size) -> Any:
        """FFmpeg's filter `scale`, which takes colour to lie between unless told; made anew where frames change."""
        from av.filter import Graph

        key = (frame.width, frame.height, frame.format.name, size)
        if self._graph is None or self._graph[0] != key:
            graph = Graph()
            graph.threads = 1
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
            )
            scale = graph.add("scale", f"{size[1]}:{size[0]}:flags=bilinear")
            graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
            self._graph = (key, graph)
        return self._graph[1]


def fitted(shape: tuple[float, float], size: Size) -> Size:
    """The largest size of a shape, whose height and width have any unit, that lies within another."""
    scale = min(most / own for most, own in zip(size, shape, strict=True))
    height, width = (min(max(round(own * scale), 1), most) for most, own in zip(size, shape, strict=True))
    return height, width


def letterboxed(frames: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """Frames [..., h, w, 3] in the middle of black ones of a size; an odd row or column of black is the last."""
    height, width = frames.shape[-3:-1]
    if (height, width) == size:
        return frames
    boxed = np.zeros((*frames.shape[:-3], *size, 3), dtype=np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    boxed[..., top : top + height, left : left + width, :] = frames
    return boxed


def upright(frame: NDArray[np.uint8], orientation: Orientation | None) -> NDArray[np.uint8]:
    """A stored frame [H, W, 3] as it is shown."""
    return frame if orientation is None else orientation.apply(frame)


def resize_nearest(frame: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """Resize to [px, px, 3] by nearest neighbour: source = floor(target * float32(in / out)) (LONGVLM.md section 2)."""
    rows, columns = (_nearest_sources(size, px) for size in frame.shape[:2])
    return frame.take(rows, axis=0).take(columns, axis=1)  # a third of what indexing by both at once takes


def _nearest_sources(size: int, px: int) -> NDArray[np.int64]:
    scale = np.float32(size) / np.float32(px)
    return np.minimum((np.arange(px, dtype=np.float32) * scale).astype(np.int64), size - 1)
