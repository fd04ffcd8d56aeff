"""How stored pictures are turned and mirrored to be shown, as a file's display matrix says."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
