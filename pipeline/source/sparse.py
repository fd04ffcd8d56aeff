"""Sparse copies of remote videos: local files of full size in which only what is needed was filled in.

Of MP4 and Matroska the index can be found by a few short reads, from the beginning on. What of the rest is needed the
decoder's confined child reads out of that index; here, where network and credentials are, its word is checked.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from longvlm.pipeline.source.fetch import WholeNeededError
from longvlm.pipeline.source.formats import container_of
from longvlm.pipeline.source.ranges import Range, RemoteObject
from longvlm.pipeline.source.scratch import await_room

MIN_BYTES = 4 << 20  # smaller objects come whole as quickly
MAX_SHARE = 0.5  # of an object: where more is needed, one request for the whole is quicker
MAX_RANGES = 20_000
_WINDOW_BYTES = 32 << 10  # read at a time while looking for the index
_TAIL_BYTES = 4 << 20  # at the end of a file, behind its pictures, is its index: read at once
_MAX_INDEX_BYTES = 256 << 20
_MAX_ELEMENTS = 1000  # at the top level
_GAP_BYTES = 64 << 10  # ranges so near are one; nearer where there are many, so that gaps are a thirtieth of the file
_GAPS_SHARE = 32
_SEGMENT, _SEEK_HEAD, _CLUSTER, _CUES = 0x18538067, 0x114D9B74, 0x1F43B675, 0x1C53BB6B  # of Matroska, RFC 9559
_SEEK, _SEEK_ID, _SEEK_POSITION = 0x4DBB, 0x53AB, 0x53AC
_SOUGHT = (_CUES, 0x1549A966, 0x1654AE6B, 0x1254C367)  # cues, and Info, Tracks and Tags wherever they lie


def may_be_sparse(size_bytes: int) -> bool:
    """Whether an object is large enough for several short reads to be quicker than one long one."""
    return size_bytes >= MIN_BYTES


class SparseCopy:
    """A sparse copy that is being filled, at a path, of an object of `size_bytes`."""

    def __init__(self, remote: RemoteObject, path: str, size_bytes: int) -> None:
        self.remote, self.path, self.size_bytes = remote, path, size_bytes
        self.have: list[Range] = []  # what is filled: ascending, apart from each other
        with open(path, "wb") as file:  # noqa: PTH123 - as everywhere
            os.truncate(file.fileno(), size_bytes)

    def fetch_index(self) -> None:
        """Fill in the container's index and all headers before it.

        Raises:
            WholeNeededError: there is none, or not in a place that can be found.

        And as `RemoteObject.read`.
        """
        container = container_of(self._bytes(0, min(4096, self.size_bytes)))
        if container == "MP4":
            self._fetch_boxes()
        elif container == "Matroska":
            self._fetch_elements()
        else:
            raise WholeNeededError("no index")

    def fetch(self, wanted: Sequence[Sequence[int]]) -> None:
        """Fill in byte ranges that somebody names who is not trusted.

        Raises:
            WholeNeededError: they cover most of the object, or cannot be ranges of it.

        And as `RemoteObject.read`.
        """
        if len(wanted) > MAX_RANGES:
            raise WholeNeededError("too many ranges")
        ranges = sorted((start, end) for start, end in wanted)
        if any(not 0 <= start < end <= self.size_bytes for start, end in ranges) or any(
            after[0] < before[1] for before, after in pairwise(ranges)
        ):
            raise WholeNeededError("ranges that are none")
        missing = [piece for start, end in ranges for piece in self._missing(start, end)]
        near = min(_GAP_BYTES, self.size_bytes // (_GAPS_SHARE * max(len(missing), 1)))
        missing = _joined(missing, near)
        if sum(end - start for start, end in [*self.have, *missing]) > MAX_SHARE * self.size_bytes:
            raise WholeNeededError("most of it")
        self._fill(missing)

    def _fill(self, ranges: list[Range]) -> None:
        """Read ranges that are missing, and write them where they belong."""
        if not ranges:
            return
        await_room(sum(end - start for start, end in ranges), os.path.dirname(self.path))  # noqa: PTH120
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            for (start, _), data in zip(ranges, self.remote.read(ranges), strict=True):
                os.pwrite(descriptor, data, start)
        finally:
            os.close(descriptor)
        self.have = _joined([*self.have, *ranges], 0)

    def _missing(self, start: int, end: int) -> Iterator[Range]:
        """What of a range is not filled."""
        place = max(bisect_right(self.have, (start, self.size_bytes + 1)) - 1, 0)
        for have_start, have_end in self.have[place:]:
            if have_start >= end:
                break
            if start < have_start:
                yield start, have_start
            start = max(start, have_end)
        if start < end:
            yield start, end

    def _bytes(self, start: int, num_bytes: int) -> bytes:
        """Some bytes of the object, fetched with what follows them where they are not here."""
        start, end = min(start, self.size_bytes), min(start + num_bytes, self.size_bytes)
        if list(self._missing(start, end)):
            ahead = self.size_bytes - start
            is_tail = start > self.size_bytes // 2 and ahead <= _TAIL_BYTES
            ahead = ahead if is_tail else max(num_bytes, _WINDOW_BYTES)
            self._fill(list(self._missing(start, min(start + ahead, self.size_bytes))))
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(start)
            return file.read(end - start)

    def _fetch_whole(self, start: int, end: int) -> None:
        """Fill in a part of the index, which may not be larger than any honest one."""
        if end > self.size_bytes or end - start > _MAX_INDEX_BYTES:
            raise WholeNeededError("no index")
        self._fill(list(self._missing(start, end)))

    # --- MP4: ISO/IEC 14496-12, section 4.2 ---

    def _fetch_boxes(self) -> None:
        """The headers of all boxes at the top level, and the box `moov`."""
        offset, kinds = 0, set()
        for _ in range(_MAX_ELEMENTS):
            if offset + 8 > self.size_bytes:
                break
            header = self._bytes(offset, 16)
            kind, size = header[4:8], int.from_bytes(header[:4], "big")
            if size == 1:  # a 64-bit size follows
                size = int.from_bytes(header[8:16], "big")
            elif size == 0:  # to the end of the file
                size = self.size_bytes - offset
            if size < 8:
                break
            kinds.add(kind)
            if kind == b"moof":
                raise WholeNeededError("fragmented")
            if kind == b"moov":
                self._fetch_whole(offset, offset + size)
            offset += size
        if b"moov" not in kinds:
            raise WholeNeededError("no index")

    # --- Matroska: RFC 8794 and RFC 9559 ---

    def _fetch_elements(self) -> None:
        """All headers before the first cluster, and the cues and their like wherever the seek head says they are."""
        _, header_end = self._element(0, self.size_bytes)
        kind, (begin, end) = self._element_at(header_end)
        if kind != _SEGMENT:
            raise WholeNeededError("no index")
        offset, places = begin, dict[int, int]()
        for _ in range(_MAX_ELEMENTS):
            kind, (start, stop) = self._element_at(offset)
            if kind == _CLUSTER or stop > end:
                break
            if kind in (_SEEK_HEAD, *_SOUGHT):
                self._fetch_whole(offset, stop)
            if kind == _SEEK_HEAD:
                places |= self._sought(start, min(stop, start + _WINDOW_BYTES), begin)
            offset = stop
        if _CUES not in places:
            raise WholeNeededError("no index")
        for place in places.values():
            kind, (_, stop) = self._element_at(place)
            self._fetch_whole(place, stop)

    def _sought(self, start: int, stop: int, begin: int) -> dict[int, int]:
        """Where a seek head says that elements are, by their ids, in bytes from the beginning of the file."""
        places = {}
        for kind, inner in self._children(start, stop):
            if kind == _SEEK:
                entry = {name: int.from_bytes(self._bytes(a, b - a), "big") for name, (a, b) in self._children(*inner)}
                if entry.get(_SEEK_ID) in _SOUGHT and _SEEK_POSITION in entry:
                    places[entry[_SEEK_ID]] = begin + entry[_SEEK_POSITION]
        return places

    def _children(self, start: int, stop: int) -> Iterator[tuple[int, Range]]:
        while start < stop:
            kind, inner = self._element_at(start)
            yield kind, inner
            start = inner[1]

    def _element_at(self, offset: int) -> tuple[int, Range]:
        """The id of the element there, and the range of what it holds."""
        inner, end = self._element(offset, self.size_bytes)
        id_bytes = 9 - self._bytes(offset, 1)[0].bit_length()
        return int.from_bytes(self._bytes(offset, id_bytes), "big"), (inner, end)

    def _element(self, offset: int, limit: int) -> Range:
        """Where what an element holds begins and ends; one of unknown size ends where the file does."""
        head = self._bytes(offset, 12)
        try:
            id_bytes = 9 - head[0].bit_length()
            size_bytes = 9 - head[id_bytes].bit_length()
            coded = head[id_bytes : id_bytes + size_bytes]
        except IndexError as error:
            raise WholeNeededError("no index") from error
        if id_bytes > 4 or size_bytes > 8 or len(coded) < size_bytes:
            raise WholeNeededError("no index")
        size = int.from_bytes(coded, "big") - (1 << 7 * size_bytes)
        begin = offset + id_bytes + size_bytes
        is_unknown = size == (1 << 7 * size_bytes) - 1
        return begin, limit if is_unknown else begin + size


def _joined(ranges: Sequence[Range], near: int) -> list[Range]:
    """Ascending ranges with those made one that touch, or have no more than `near` bytes between them."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= near:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
