"""The sample table of an MP4's track, read from the file's own boxes (ISO/IEC 14496-12, chapter 8).

FFmpeg's index of a file says when its samples are decoded, and not by how much later each is shown: that stands in the
table alone. Every number in it may be a lie, so what cannot be right is no table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.frame_index import PACKET
from longvlm.pipeline.decode.times import MAX_FRAMES
from longvlm.pipeline.source.formats import top_level_boxes

_MAX_INDEX_BYTES = 256 << 20  # of the box `moov`: two hours are 5 MB of it
_TABLE = (b"mdia", b"minf", b"stbl")  # where it lies in a track
SAMPLE = np.dtype([*PACKET.descr, ("pos", "i8"), ("size", "i8")])  # a packet, and its bytes in the file


@dataclass(frozen=True)
class SampleTable:
    """The N samples of a track in the order of decoding."""

    positions: NDArray[np.int64]  # [N] bytes from the beginning of the file
    sizes: NDArray[np.int64]  # [N] bytes
    durations: NDArray[np.int64]  # [N] ticks of the track
    offsets: NDArray[np.int64]  # [N] ticks from decoding to showing, but for a shift that is the same for all


def read_sample_table(path: str, track_id: int) -> SampleTable | None:
    """The sample table of a track; None where there is none that is whole and agrees with itself."""
    moov = _movie_box(path)
    tracks = [body for kind, body in _boxes(moov) if kind == b"trak" and _track_id(body) == track_id]
    if len(tracks) != 1:
        return None
    table = tracks[0]
    for kind in _TABLE:
        table = dict(_boxes(table)).get(kind, memoryview(b""))
    boxes = dict(_boxes(table))
    sizes = _sizes(boxes.get(b"stsz"))
    if sizes is None or not 0 < len(sizes) <= MAX_FRAMES:
        return None
    positions = _positions(boxes, sizes)
    durations = _runs(boxes.get(b"stts"), len(sizes))
    offsets = _runs(boxes[b"ctts"], len(sizes)) if b"ctts" in boxes else np.zeros_like(sizes)
    if positions is None or durations is None or offsets is None:
        return None
    return SampleTable(positions, sizes, durations, offsets.astype(np.int32).astype(np.int64))  # of both versions


def sample_packets(file: VideoFile) -> NDArray[np.void] | None:
    """[P] of `SAMPLE`: the packets that demultiplexing an MP4 gives, known without reading them.

    FFmpeg's index has the samples that the edit list leaves, in order, with the times at which they are decoded; the
    table has the rest. None where the two do not fit together, or do not give the times of two packets that are asked
    for, be they holes in a sparse copy. The file stands elsewhere afterwards.
    """
    table = read_sample_table(file.path, file.stream.id)
    if table is None:
        return None
    entries = np.fromiter(
        ((e.timestamp, e.is_keyframe, e.is_discard, e.pos, e.size) for e in list(file.stream.index_entries)),
        dtype=[("dts", "i8"), ("is_key", "?"), ("is_discard", "?"), ("pos", "i8"), ("size", "i8")],
    )
    entries = entries[entries["size"] > 0]
    places = _places(table, entries)
    keys = np.flatnonzero(entries["is_key"])
    if places is None or not len(keys) or entries["is_discard"].all():
        return None
    if (entries["pos"] + entries["size"] > file.size_bytes).any():
        return None
    packets = np.zeros(len(entries), dtype=SAMPLE)
    for name in entries.dtype.names or ():
        packets[name] = entries[name]
    packets["duration"] = table.durations[places]
    packets["pts"] = entries["dts"] + table.offsets[places]
    shifts = {_shift(file, packets, key) for key in (keys[0], keys[-1])}
    packets["pts"] += shifts.pop()
    return packets if not shifts and not np.isnan(packets["pts"]).any() else None


def _places(table: SampleTable, entries: NDArray[np.void]) -> NDArray[np.int64] | None:
    """Which sample of the table each entry of FFmpeg's index is; None where one is none, or might be two."""
    filled = np.flatnonzero(table.sizes)
    order = filled[np.argsort(table.positions[filled])]
    positions = table.positions[order]
    if not len(entries) or not len(order) or (np.diff(positions) <= 0).any():
        return None
    places = order[np.minimum(np.searchsorted(positions, entries["pos"]), len(order) - 1)]
    agree = (table.positions[places] == entries["pos"]) & (table.sizes[places] == entries["size"])
    return places if agree.all() else None


def _shift(file: VideoFile, packets: NDArray[np.void], key: int) -> float:
    """By how many ticks FFmpeg shows a packet about there later than the table says; NaN where it does not tell."""
    import av

    try:
        file.container.seek(int(packets["dts"][key]), stream=file.stream)
        packet = next(file.container.demux(file.stream))
    except av.FFmpegError:
        return np.nan
    found = np.flatnonzero(packets["pos"] == packet.pos)
    if not len(found) or packet.pts is None or packet.dts not in (None, int(packets["dts"][found[0]])):
        return np.nan
    return float(packet.pts - packets["pts"][found[0]])


def _movie_box(path: str) -> memoryview:
    """What the first box `moov` holds; nothing where there is none of a size that can be."""
    found = [(offset, size) for kind, offset, size in top_level_boxes(path) if kind == b"moov"]
    if not found or found[0][1] > _MAX_INDEX_BYTES:
        return memoryview(b"")
    offset, size = found[0]
    with Path(path).open("rb") as file:
        file.seek(offset)
        return next((body for _, body in _boxes(memoryview(file.read(size)))), memoryview(b""))


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes side by side in some bytes, each with what it holds, up to the first that does not fit."""
    offset = 0
    while offset + 8 <= len(data):
        size, header = int.from_bytes(data[offset : offset + 4], "big"), 8
        if size == 1:  # a 64-bit size follows
            size, header = int.from_bytes(data[offset + 8 : offset + 16], "big"), 16
        elif size == 0:  # to the end
            size = len(data) - offset
        if size < header or offset + size > len(data):
            return
        yield bytes(data[offset + 4 : offset + 8]), data[offset + header : offset + size]
        offset += size


def _track_id(track: memoryview) -> int:
    """The number of a track, in its header; 0, which none has, where there is no header."""
    header = dict(_boxes(track)).get(b"tkhd", memoryview(b""))
    place = 20 if len(header) and header[0] == 1 else 12  # behind two times, of 64 bits or of 32
    return int.from_bytes(header[place : place + 4], "big")


def _sizes(box: memoryview | None) -> NDArray[np.int64] | None:
    """The sizes of the samples: one for all, or one for each."""
    if box is None or len(box) < 12:
        return None
    size, num = int.from_bytes(box[4:8], "big"), int.from_bytes(box[8:12], "big")
    if num > MAX_FRAMES:
        return None
    return np.full(num, size, dtype=np.int64) if size else _numbers(box, 12, num, ">u4")


def _positions(boxes: dict[bytes, memoryview], sizes: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Where the samples lie: one after the other in chunks, of known places and numbers of samples."""
    wide = b"co64" in boxes
    chunks = _entries(boxes.get(b"co64" if wide else b"stco"), ">u8" if wide else ">u4", 1)
    runs = _entries(boxes.get(b"stsc"), ">u4", 3)
    if chunks is None or runs is None or not len(runs):
        return None
    first, in_chunk = runs[:, 0] - 1, runs[:, 1]
    chunks_each = np.diff(np.append(first, len(chunks)))
    if first[0] != 0 or (chunks_each <= 0).any() or (chunks_each * in_chunk).sum() != len(sizes):
        return None
    num_samples = np.repeat(in_chunk, chunks_each)
    before = np.append(0, np.cumsum(sizes))
    chunk_begins = before[np.append(0, np.cumsum(num_samples))[:-1]]
    return before[:-1] + np.repeat(chunks[:, 0] - chunk_begins, num_samples)


def _runs(box: memoryview | None, num_samples: int) -> NDArray[np.int64] | None:
    """A number for each sample, of a box that says how many samples in a row have which."""
    runs = _entries(box, ">u4", 2)
    return None if runs is None or runs[:, 0].sum() != num_samples else np.repeat(runs[:, 1], runs[:, 0])


def _entries(box: memoryview | None, kind: str, width: int) -> NDArray[np.int64] | None:
    """The entries [n, width] of a box that begins with how many there are; None where it is too short for them."""
    if box is None or len(box) < 8:
        return None
    num = int.from_bytes(box[4:8], "big")
    numbers = _numbers(box, 8, num * width, kind)
    return None if numbers is None else numbers.reshape(num, width)


def _numbers(box: memoryview, start: int, num: int, kind: str) -> NDArray[np.int64] | None:
    """So many numbers from a byte of a box on; None where they reach beyond it."""
    if num * np.dtype(kind).itemsize > len(box) - start:
        return None
    return np.frombuffer(box, kind, num, start).astype(np.int64)
