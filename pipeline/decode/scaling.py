"""Scaling of decoded frames: to small RGB ones by FFmpeg's bilinear scaler, to a shape in black, or to the nearest.

And how stored pictures are turned and mirrored to be shown, as a file's display matrix says.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]  # height and width, pixels
# What a GPU hands out, colours side by side, and the same with each in a plane of its own, as CPUs decode it.
_PLANAR = {"nv12": "yuv420p", "p010le": "yuv420p10le"}


@dataclass(frozen=True)
class Orientation:
    """What is done to stored pictures, in this order; what is shown is one of eight ways to lay a picture down."""

    transpose: bool = False  # rows become columns
    mirror_rows: bool = False  # then left and right are exchanged
    mirror_columns: bool = False  # then top and bottom are

    def apply(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The picture as shown, [H, W, 3] or, transposed, [W, H, 3]."""
        shown = frame.swapaxes(0, 1) if self.transpose else frame
        shown = shown[:, ::-1] if self.mirror_rows else shown
        return shown[::-1] if self.mirror_columns else shown


def orientation_of(frame: Any) -> Orientation | None:
    """The orientation of a decoded frame; None where it has no display matrix, or one that changes nothing.

    The nine numbers a b u, c d v, x y w take a stored place (p, q) to (a p + c q + x, b p + d q + y) (ISO/IEC 14496-12,
    section 6.2.2). One that maps a picture onto a line or a point means nothing: such pictures are shown as stored.
    Angles between the quarters go to the nearest quarter.
    """
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d, *_ = (int(number) for number in np.frombuffer(bytes(matrix), dtype=np.int32))
    if a * d == b * c:
        return Orientation()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        orientation = Orientation(mirror_rows=a < 0, mirror_columns=d < 0)
        return orientation if (a, b, c, d) != (1 << 16, 0, 0, 1 << 16) else None
    return Orientation(transpose=True, mirror_rows=c < 0, mirror_columns=b < 0)


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
        self._planes: Any = VideoReformatter()
        self._graph: tuple[tuple[Any, ...], Any] | None = None  # what frames it takes and gives, the graph

    def scale(self, frame: Any, size: Size) -> NDArray[np.uint8]:
        """A decoded frame as RGB of a size, [height, width, 3]."""
        height, width = size
        frame = self.planar(frame)
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
        small = self._swscale.reformat(self.planar(frame), format="rgb24", threads=1)
        pixels: NDArray[np.uint8] = small.to_ndarray()
        return pixels

    def planar(self, frame: Any) -> Any:
        """A decoded frame with each colour in a plane of its own: the scaler rounds others differently."""
        planar = _PLANAR.get(frame.format.name)
        return frame if planar is None else self._planes.reformat(frame, format=planar, threads=1)

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
