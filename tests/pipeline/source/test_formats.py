import pytest

from clips import write_clip
from longvlm.pipeline.source.formats import container_of, is_encrypted, read_head, top_level_boxes
from support import VIDEOS, cases


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", "MP4"),
        ("a.mov", "libx264", "MP4"),
        ("a.mkv", "libx264", "Matroska"),
        ("a.avi", "mpeg4", "AVI"),
        ("a.ts", "mpeg2video", "MPEG-TS"),
        ("a.flv", "libx264", "FLV"),
        ("a.wmv", "wmv2", "ASF"),
        ("a.mpg", "mpeg2video", "MPEG-PS"),
    ],
)
def test_containers_announce_themselves(tmp_path, name, codec, container):
    assert container_of(read_head(str(write_clip(tmp_path / name, 5, codec=codec)))) == container


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"G",
        b"GIF89a",
        b"plain text, longer than any signature" * 20,
        b"\x89PNG\r\n\x1a\n",
        b"\0\0\0\x1cftypheic",
        b"\0\0\0\x1cftypM4A ",
        b"RIFF\0\0\0\0WAVE",
        b"OggS" + b"\0" * 24 + b"\x7fvorbis",
    ],
)
def test_other_files_announce_no_video(head):
    assert container_of(head) is None


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS / "good", "*"))
def test_real_clips_announce_themselves(path):
    assert container_of(read_head(str(path))) is not None


def test_boxes_end_where_the_structure_does(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 5)
    boxes = top_level_boxes(str(path))
    assert {b"ftyp", b"moov", b"mdat"} <= {kind for kind, _, _ in boxes}
    assert sum(size for _, _, size in boxes) == path.stat().st_size
    (tmp_path / "b.mp4").write_bytes(path.read_bytes() + b"\0\0\0\3free")
    assert top_level_boxes(str(tmp_path / "b.mp4")) == boxes
    assert not is_encrypted(str(path))
