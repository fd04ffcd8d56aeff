from collections import Counter

import pytest

from longvlm.pipeline.source.leftovers import count_left_out, describe_left_out, leftover


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("sub/._a.mp4", "._*"),
        (".AppleDouble/a.mp4", ".AppleDouble"),
        ("x/@eaDir/a.mp4/SYNOVIDEO.mp4", "@eaDir"),
        ("x/@EADIR/", "@EADIR"),
        (".Trashes/501/a.mp4", ".Trashes"),
        (".Trash-1000/files/a.mp4", ".Trash-1000"),
        ("#recycle/a.mp4", "#recycle"),
        ("$RECYCLE.BIN/S-1-5/a.mp4", "$RECYCLE.BIN"),
        ("System Volume Information/a.mp4", "System Volume Information"),
        ("__MACOSX/a.mp4", "__MACOSX"),
        (".trashed-1690000000-a.mp4", ".trashed-*"),
        ("a.mp4.part", ".part"),
        ("a.f137.mp4.part-Frag12", ".part-frag12"),
        ("a.mp4.CRDOWNLOAD", ".crdownload"),
        ("a.temp.mp4", ".temp.mp4"),
    ],
)
def test_what_is_nobodys_video(path, kind):
    assert leftover(path) == kind


@pytest.mark.parametrize(
    "path", ["a.mp4", ".hidden.mp4", "part/a.part1.mp4", "tmp/a.mp4", "recycle/a.mp4", "a.part.d/b.mp4"]
)
def test_what_may_be_somebodys(path):
    assert leftover(path) is None


def test_what_is_left_out_is_told_by_kind_and_kinds_are_bounded():
    left_out = Counter()
    for path in ["a.SRT", "b.srt", "x/c.jpg", "README", "d.a b", "._e.mp4"]:
        count_left_out(left_out, path, leftover(path))
    assert left_out == {".srt": 2, ".jpg": 1, "no ending": 1, "other": 1, "._*": 1}
    assert describe_left_out(Counter({".srt": 9, ".jpg": 5})) == "14 files (.srt 9, .jpg 5)"
    assert describe_left_out(Counter({".srt": 1})) == "1 file (.srt 1)"
    for i in range(1000):
        count_left_out(left_out, f"a.x{i}")
    assert len(left_out) <= 101
    assert left_out.total() == 1006
    assert describe_left_out(left_out).endswith("more kinds)")
