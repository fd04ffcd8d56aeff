"""Field pictures of H.264: a frame that is coded as two fields may come in two packets, and is one frame all the same.

FFmpeg's parser makes a packet of every coded picture and says nowhere whether it is a field, so the first bits of each
are read here (ITU-T H.264, sections 7.3.2.1.1 and 7.3.3). Streams that cannot have fields, nearly all, are not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

_SLICES, _SEQUENCE = (1, 5), 7  # kinds of NAL units
_WITH_CHROMA_FORMAT = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)  # profiles
_HEAD_BYTES = 64  # of a slice: more than its header's first fields take


@dataclass
class FieldPairs:
    """What tells the second field of a frame from other pictures, packet after packet."""

    length_bytes: int  # in front of each NAL unit; 0: start codes
    frame_num_bits: int
    has_planes: bool
    open_field: tuple[int, int] | None = None  # frame_num and parity of a first field, until its second has come

    def is_second(self, packet: bytes) -> bool:
        """Whether the next packet of a stream is the second field of a frame."""
        field = self._field(packet)
        is_second = field is not None and self.open_field == (field[0], 1 - field[1])
        self.open_field = None if is_second else field
        return is_second

    def _field(self, packet: bytes) -> tuple[int, int] | None:
        """frame_num and parity of the field that a packet begins with; None where it begins with a frame."""
        slices = (unit for unit in _units(packet, self.length_bytes) if unit[0] & 31 in _SLICES)
        unit = next(slices, None)
        if unit is None:
            return None
        bits = _Bits(unit[1:_HEAD_BYTES])
        try:
            for _ in range(3):  # first macroblock, kind of slice, parameter set
                bits.code()
            bits.take(2 * self.has_planes)
            frame_num = bits.take(self.frame_num_bits)
            return (frame_num, bits.take(1)) if bits.take(1) else None
        except ValueError:
            return None


def field_pairs(extradata: bytes | None) -> FieldPairs | None:
    """What pairs the fields of an H.264 stream with these parameter sets; None where all its pictures are frames."""
    if not extradata:
        return None
    is_avcc = extradata[0] == 1
    length_bytes = (extradata[4] & 3) + 1 if is_avcc and len(extradata) > 4 else 0
    units = _units(extradata[6:], 2) if is_avcc else _units(extradata, 0)
    sequence = next((unit for unit in units if unit[0] & 31 == _SEQUENCE), None)
    if sequence is None:
        return None
    try:
        return _read_sequence(_Bits(sequence[1:]), length_bytes)
    except ValueError:
        return None


def _read_sequence(bits: "_Bits", length_bytes: int) -> FieldPairs | None:
    profile, _, _ = bits.take(8), bits.take(16), bits.code()
    has_planes = False
    if profile in _WITH_CHROMA_FORMAT:
        chroma_format = bits.code()
        has_planes = chroma_format == 3 and bool(bits.take(1))
        _, _, _ = bits.code(), bits.code(), bits.take(1)  # depths, lossless
        if bits.take(1):
            for place in range(12 if chroma_format == 3 else 8):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if place < 6 else 64)
    frame_num_bits = bits.code() + 4
    order = bits.code()
    if order == 0:
        bits.code()
    elif order == 1:
        _, _, _ = bits.take(1), bits.code(), bits.code()
        for _ in range(bits.code()):
            bits.code()
    _, _, _, _ = bits.code(), bits.take(1), bits.code(), bits.code()  # references, gaps, width, height
    are_all_frames = bits.take(1)
    return None if are_all_frames else FieldPairs(length_bytes, frame_num_bits, has_planes)


def _skip_scaling_list(bits: "_Bits", size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.code()
            following = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
        last = following or last


def _units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The NAL units that data holds, one at least a byte long."""
    if not length_bytes:
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    place = 0
    while place + length_bytes < len(data):
        size = int.from_bytes(data[place : place + length_bytes], "big")
        place += length_bytes
        if size:
            yield data[place : place + size]
        place += size


class _Bits:
    """The bits of a NAL unit, in order; ValueError at their end."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")  # put in where the bytes would look like a start code
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, width: int) -> int:
        """So many bits, as a number."""
        self._left -= width
        if self._left < 0:
            raise ValueError("the unit ends too early")
        return (self._value >> self._left) & ((1 << width) - 1)

    def code(self) -> int:
        """An unsigned Exp-Golomb code (section 9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)
