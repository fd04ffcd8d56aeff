"""Video file formats: their extensions, and the signatures in their first bytes."""

import struct
from pathlib import Path

_EXTENSIONS = """
    3g2 3gp 3gp2 3gpp 3gpp2 f4v ismv m4s m4v mj2 mov mp4 mp4v mpg4 qt 360 insv lrf lrv
    divx avi mk3d mkv webm flv asf dvr-ms wm wmv wtv ogm ogv ogx mxf nut rm rmvb dif dv ivf obu
    m2t m2ts mpegts mts tod tp trp ts evo m2p m2ps mod mpe mpeg mpg ps vob vro
    m1v m2v mp2v mpv mpv2 26l 264 265 avc h264 h265 h26l hevc jvt
"""
VIDEO_EXTENSIONS = frozenset(_EXTENSIONS.split())
HEAD_BYTES = 4096  # enough for every signature below
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"skip", b"free", b"styp")
_MAX_MOOV_BYTES = 64 << 20  # sample entries stand near the start of each track
_PICTURE_OR_AUDIO_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"M4A ", b"M4B ")
_PREFIX_MESSAGE, _ALPHA_CHANNEL = 39, 165  # of HEVC: a kind of NAL unit, a type of message
_SIGNATURES = {
    b"\x1aE\xdf\xa3": "Matroska",
    b"FLV": "FLV",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "ASF",
    b"\x00\x00\x01\xba": "MPEG-PS",
    b"\x00\x00\x01\xb3": "MPEG",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01": "MXF",
    b"DKIF": "IVF",
}


def container_of(head: bytes) -> str | None:
    """The video container that a file's first bytes announce, such as "MP4"; None where they announce none."""
    if head[4:8] in _MP4_BOXES:
        return None if head[8:12] in _PICTURE_OR_AUDIO_BRANDS else "MP4"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    if head[:4] == b"OggS" and b"theora" in head[:128]:
        return "Ogg"
    if any(_is_transport_stream(head, *layout) for layout in ((0, 188), (4, 192))):
        return "MPEG-TS"
    return next((name for signature, name in _SIGNATURES.items() if head.startswith(signature)), None)


def _is_transport_stream(head: bytes, offset: int, packet_bytes: int) -> bool:
    """Three sync bytes (0x47) one packet apart; .m2ts puts four bytes of time in front of each packet."""
    syncs = head[offset : offset + 2 * packet_bytes + 1 : packet_bytes]
    return syncs == b"GGG"


def read_head(path: str) -> bytes:
    """The first bytes of a local file, for `container_of`."""
    with Path(path).open("rb") as file:
        return file.read(HEAD_BYTES)


def top_level_boxes(path: str) -> list[tuple[bytes, int, int]]:
    """(type, offset, size in bytes) of an MP4's top-level boxes (ISO/IEC 14496-12, section 4.2).

    Ends at the first that cannot be one; the last may claim to reach beyond the end of the file.
    """
    boxes = []
    with Path(path).open("rb") as file:
        end, offset = file.seek(0, 2), 0
        while offset + 8 <= end:
            file.seek(offset)
            size, kind = struct.unpack(">I4s", file.read(8))
            if size == 1:  # a 64-bit size follows
                size = int.from_bytes(file.read(8), "big")
            elif size == 0:  # to the end of the file
                size = end - offset
            if size < 8 or not kind.isascii():
                break
            boxes.append((kind, offset, size))
            offset += size
    return boxes


def has_whole_chunks(path: str) -> bool:
    """Whether every outermost chunk of an AVI (RIFF; several in large files) ends within the file."""
    with Path(path).open("rb") as file:
        end, offset = file.seek(0, 2), 0
        while offset + 12 <= end:
            file.seek(offset)
            kind, size = struct.unpack("<4sI", file.read(8))
            if kind != b"RIFF":
                break  # what some programs add behind the end
            offset += 8 + size + size % 2
        return 0 < offset <= end + 1


def has_alpha_layer(parameters: bytes) -> bool:
    """Whether HEVC's decoder configuration (`hvcC`, ISO/IEC 14496-15, section 8.3.3) tells of a second layer: alpha.

    Its parameter sets are of a layer above the first, or a message of the type 165 (alpha_channel_info) goes with them.
    """
    place, units = 23, []
    for _ in range(parameters[22] if len(parameters) > place else 0):
        num_units = int.from_bytes(parameters[place + 1 : place + 3], "big")
        place += 3
        for _ in range(num_units):
            size = int.from_bytes(parameters[place : place + 2], "big")
            units.append(parameters[place + 2 : place + 2 + size])
            place += 2 + size
    layers = ((unit[0] & 1) << 5 | unit[1] >> 3 for unit in units if len(unit) > 2)
    messages = (unit[2] for unit in units if len(unit) > 2 and unit[0] >> 1 == _PREFIX_MESSAGE)
    return any(layers) or _ALPHA_CHANNEL in messages


def is_encrypted(path: str) -> bool:
    """Whether an MP4 says that its samples are encrypted (ISO/IEC 23001-7: sample entry `encv`)."""
    with Path(path).open("rb") as file:
        for kind, offset, size in top_level_boxes(path):
            if kind == b"moov":
                file.seek(offset)
                return b"encv" in file.read(min(size, _MAX_MOOV_BYTES))
    return False
