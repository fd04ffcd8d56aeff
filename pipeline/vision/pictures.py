"""What a tower looks at: pictures of a segment's frames, and which of them it has seen already."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
from torch import Tensor


@dataclass(frozen=True)
class SegmentPictures:
    """The pictures that a segment's frames make, in time order; a last one that is not full shows its frame again."""

    numbers: tuple[tuple[int, ...], ...]  # B: of the frames of each, in the video
    times_s: tuple[float, ...]  # B: the middle of when their first and last frames begin to be shown
    places: tuple[tuple[int, ...], ...]  # B: of their frames, among the segment's own

    @classmethod
    def of(cls, numbers: Sequence[int], times_s: Sequence[float], frames_per_picture: int) -> "SegmentPictures":
        """The pictures of a segment's frames, by their numbers and times."""
        last = len(numbers) - 1
        starts = range(0, len(numbers), frames_per_picture)
        places = [tuple(min(start + i, last) for i in range(frames_per_picture)) for start in starts]
        return cls(
            tuple(tuple(numbers[place] for place in picture) for picture in places),
            tuple((times_s[picture[0]] + times_s[picture[-1]]) / 2 for picture in places),
            tuple(places),
        )


def distinct_numbers(segments: Iterable[Mapping[str, Any]]) -> list[int]:
    """The numbers of the frames that some segments show, each once, ascending: as tables.FRAMES holds their pixels."""
    return sorted({number for segment in segments for number in segment["frames"]})


def still_frames(numbers: Sequence[int], pixels: Tensor) -> dict[int, int]:
    """Frames that show what the one before shows, byte for byte: their number -> that of the first that shows it.

    Slides, screens and cameras of empty rooms have them. Comparing takes some microseconds a frame.

    Args:
        numbers: of the frames, ascending.
        pixels: theirs, uint8 [F, height, width, 3], contiguous.
    """
    still: dict[int, int] = {}
    frames = [pa.py_buffer(frame) for frame in pixels.numpy()]
    for (before, shown_before), (number, shown) in pairwise(zip(numbers, frames, strict=True)):
        if shown.equals(shown_before):
            still[number] = still.get(before, before)
    return still


def distinct_pictures(
    shown: Sequence[Sequence[SegmentPictures]], still: Sequence[Mapping[int, int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """The numbers of the frames of each unit that are to be encoded, and where each segment's pictures are then.

    No picture is encoded twice.

    Args:
        shown: the segments of each unit.
        still: of each unit, as `still_frames` tells.
    """
    distinct: list[list[int]] = []
    places: list[list[int]] = []
    num_before = 0
    for unit, first_of in zip(shown, still, strict=True):
        place_of: dict[tuple[int, ...], int] = {}  # by numbers, in the order of the unit's distinct pictures
        chosen: list[int] = []
        for segment in unit:
            places.append([])
            for numbers in segment.numbers:
                seen = tuple(first_of.get(number, number) for number in numbers)
                if seen not in place_of:
                    place_of[seen] = num_before + len(place_of)
                    chosen += numbers
                places[-1].append(place_of[seen])
        distinct.append(chosen)
        num_before += len(place_of)
    return distinct, places
