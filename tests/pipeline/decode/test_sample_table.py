import random
import struct

import numpy as np
import pytest

from clips import cut, remux, write_clip
from longvlm.pipeline.decode.container import VideoFile
from longvlm.pipeline.decode.frame_index import PACKET
from longvlm.pipeline.decode.sample_table import read_sample_table, sample_packets
from longvlm.schemas.errors import TerminalError
from support import VIDEOS, cases

UNEVEN_S = [number / 25 + 0.3 * (number // 7) for number in range(100)]
B_FRAMES = {"preset": "medium", "bf": "3"}


def told(path):
    file = VideoFile(str(path), is_brief=True)
    try:
        return sample_packets(file)
    finally:
        file.close()


def read(path):
    """The packets as FFmpeg gives them, by reading the file."""
    file = VideoFile(str(path))
    try:
        return np.fromiter(file._packets(), dtype=PACKET)
    finally:
        file.close()


def assert_told(path):
    packets = told(path)
    assert packets is not None
    assert packets[list(PACKET.names)].tolist() == read(path).tolist()
    content = path.read_bytes()
    assert all(packet["size"] and packet["pos"] + packet["size"] <= len(content) for packet in packets)


def late(ticks):
    def change(_, packet):
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        return True

    return change


@pytest.mark.parametrize(
    ("name", "options", "change"),
    [
        ("plain.mp4", {}, late(0)),
        ("first.mp4", {"movflags": "faststart"}, late(0)),
        ("negative.mp4", {"movflags": "negative_cts_offsets"}, late(0)),
        ("late.mp4", {}, late(45_000)),
        ("no-edits.mp4", {"use_editlist": "0"}, late(0)),
        ("quick.mov", {}, late(0)),
    ],
)
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_the_table_tells_the_packets_that_reading_gives(tmp_path, name, options, change, codec):
    coding = B_FRAMES if codec == "libx264" else {}
    source = write_clip(tmp_path / "source.mp4", 100, times_s=UNEVEN_S, codec=codec, options=coding, audio_s=2.0)
    path = remux(source, tmp_path / name, change, **options)
    assert_told(path)
    assert len(np.unique(np.diff(told(path)["dts"]))) > 1


def test_what_an_edit_list_hides_is_told(tmp_path):
    source = write_clip(tmp_path / "source.mp4", 100, times_s=UNEVEN_S, options=B_FRAMES, gop=25)
    cut(source, tmp_path / "cut.mp4", round(UNEVEN_S[40] * 90_000))
    assert_told(tmp_path / "cut.mp4")
    hidden = told(tmp_path / "cut.mp4")["is_discard"]
    assert 0 < hidden.sum() < len(hidden)


def test_an_edit_that_ends_before_the_file_does_is_told(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 100, times_s=UNEVEN_S, options=B_FRAMES, gop=25)
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # the length of the first edit, in thousandths
    content[place : place + 4] = struct.pack(">I", 2000)
    path.write_bytes(content)
    assert_told(path)
    assert len(told(path)) < 100


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "f.mp4"])
def test_where_there_is_no_table_none_is_told(tmp_path, name):
    source = write_clip(tmp_path / "source.mp4", 50)
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "f.mp4" else {}
    assert told(remux(source, tmp_path / name, **options)) is None


@pytest.mark.parametrize("kind", [b"stts", b"ctts", b"stsz", b"stco", b"stsc", b"tkhd"])
def test_a_table_that_claims_more_than_there_is_is_none(tmp_path, kind):
    path = write_clip(tmp_path / "a.mp4", 50, times_s=UNEVEN_S[:50], options=B_FRAMES)
    assert read_sample_table(str(path), 1) is not None
    content = bytearray(path.read_bytes())
    place = content.index(kind) + (12 if kind == b"stsz" else 8) + (8 if kind == b"tkhd" else 0)
    content[place : place + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert read_sample_table(str(path), 1) is None


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_index_tells_what_reading_gives_or_nothing(tmp_path, seed):
    source = random.Random(seed)
    path = write_clip(tmp_path / "a.mp4", 30, times_s=UNEVEN_S[:30], options=B_FRAMES, size=(32, 32))
    content = bytearray(path.read_bytes())
    for _ in range(1 + seed % 3):
        content[source.randrange(content.index(b"moov") + 4, len(content))] = source.randrange(256)
    path.write_bytes(content)
    try:
        packets = told(path)
    except TerminalError:
        return
    if packets is not None:
        assert packets[["pts", "is_discard"]].tolist() == read(path)[["pts", "is_discard"]].tolist()


@pytest.mark.corpus
@pytest.mark.parametrize("path", [*cases(VIDEOS, "good/*.mp4"), *cases(VIDEOS, "reports/*.mp4")])
def test_real_tables_tell_what_reading_gives(path):
    try:
        packets = told(path)
    except TerminalError:
        return
    if packets is not None:
        assert packets[list(PACKET.names)].tolist() == read(path).tolist()
