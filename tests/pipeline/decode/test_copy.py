from dataclasses import replace

import numpy as np
import pytest

from clips import cut, damage, remux, write_clip
from longvlm.pipeline.decode.copy import may_need_little, video_copy
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.units import decode_units
from longvlm.pipeline.source import sparse
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.tower import TowerSpec
from support import VIDEOS, cases

QUICK_VP9 = {"deadline": "realtime", "cpu-used": "8"}
TOWER = TowerSpec("tower", "w", 4, (4, 4), 64, 56, has_cls=True, search_dim=None)
RECIPE = IndexRecipe("many", TOWER, "interval", 5, 20, segment_s=20.0, decode="keyframe")


@pytest.fixture(scope="module")
def decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=1500 << 20) as decoder:
        yield decoder


@pytest.fixture(autouse=True)
def sparse_however_small(monkeypatch):
    monkeypatch.setattr(sparse, "MIN_BYTES", 0)
    monkeypatch.setattr(sparse, "MAX_SHARE", 1.0)
    monkeypatch.setattr(sparse, "_WINDOW_BYTES", 1 << 10)


def watch(path, s3, decoder, scratch, recipe=RECIPE):
    """The rows of a video in a bucket, and of the same file here."""
    s3.upload_file(str(path), "bucket", path.name)
    (listed,) = list_source(Source("s3://bucket")).to_pylist()
    rows = []
    for uri in (listed["uri"], str(path)):
        with video_copy({**listed, "uri": uri, "write_id": "w"}, recipe, decoder, str(scratch)) as copy:
            rows.append([unit.to_pylist()[0] for unit in decode_units(copy, recipe, decoder)])
    return rows


def without_figures(rows):
    return [row | {"decode_ms": 0.0, "read_bytes": 0, "whole_because": None} for row in rows]


@pytest.mark.parametrize(
    ("name", "options", "codec"),
    [
        ("a.mp4", {}, "libx264"),
        ("b.mp4", {"movflags": "faststart"}, "libx264"),
        ("c.mkv", {}, "libx264"),
        ("d.webm", {}, "libvpx-vp9"),
        ("e.mp4", {}, "libx265"),
    ],
)
def test_a_sparse_copy_gives_what_the_whole_file_does(tmp_path, s3, decoder, name, options, codec):
    more = {"options": QUICK_VP9} if name.endswith("webm") else {"audio_s": 2.0}
    plain = write_clip(tmp_path / f"plain{name[1:]}", 600, size=(160, 120), codec=codec, gop=100, **more)
    path = plain.rename(tmp_path / name) if codec == "libvpx-vp9" else remux(plain, tmp_path / name, **options)
    far, near = watch(path, s3, decoder, tmp_path)
    assert without_figures(far) == without_figures(near)
    assert {row["decoder"] for row in far} == {"pyav-keyframes"}
    assert [row["whole_because"] for row in far] == [None] * len(far)
    assert 0 < sum(row["read_bytes"] for row in far) < path.stat().st_size
    assert sum(row["read_bytes"] for row in near) == 0


UNEVEN_S = [number / 25 + 0.3 * (number // 7) for number in range(300)]
# The first frame is shown long after it is decoded, keyframes soon after: FFmpeg seeks to ones before.
SLOW_START_S = [min(number, 6) / 2 + max(number - 6, 0) / 25 for number in range(300)]


@pytest.mark.parametrize(("times_s", "first"), [(UNEVEN_S, 0), (SLOW_START_S, 0), (UNEVEN_S, 65)])
def test_a_variable_frame_rate_is_no_reason_to_fetch_the_whole(tmp_path, s3, decoder, times_s, first):
    options = {"preset": "medium", "bf": "3"}
    path = write_clip(tmp_path / "plain.mp4", 300, size=(160, 120), times_s=times_s, options=options, gop=50)
    if first:
        path = cut(path, tmp_path / "cut.mp4", round(times_s[first] * 90_000))
    far, near = watch(path, s3, decoder, tmp_path, replace(RECIPE, segment_s=10.0))
    assert without_figures(far) == without_figures(near)
    assert {row["decoder"] for row in far} == {"pyav-keyframes"}
    assert [row["whole_because"] for row in far] == [None] * len(far)
    assert far[0]["num_frames"] == 300 - first
    assert far[0]["duration_s"] == pytest.approx(times_s[299] - times_s[first], abs=0.6)
    assert 0 < sum(row["read_bytes"] for row in far) < path.stat().st_size / 2


def test_why_a_file_is_fetched_whole_is_told_once(tmp_path, s3, decoder):
    path = write_clip(tmp_path / "a.mp4", 600, gop=600)
    far, near = watch(path, s3, decoder, tmp_path, replace(RECIPE, segment_s=4.0, frames_per_segment=20))
    assert without_figures(far) == without_figures(near)
    assert [row["whole_because"] for row in far] == ["few keyframes", None]
    assert far[1]["read_bytes"] == 0 < path.stat().st_size <= far[0]["read_bytes"]


def test_a_keyframe_that_does_not_decode_costs_the_sparse_copy_and_no_more(tmp_path, s3, decoder):
    path = write_clip(tmp_path / "a.mp4", 600, size=(160, 120), gop=100)
    damage(path, 200, 200, b"\0")
    far, near = watch(path, s3, decoder, tmp_path)
    assert without_figures(far) == without_figures(near)
    assert [row["whole_because"] for row in far if row["whole_because"]] == ["decode_failed"]


def test_a_decoder_that_dies_between_two_units_goes_on_with_the_same_keyframes(tmp_path, s3, decoder):
    path = write_clip(tmp_path / "a.mp4", 600, size=(160, 120), gop=100)
    recipe = replace(RECIPE, frames_per_segment=100, segment_s=10.0)
    (_, near) = watch(path, s3, decoder, tmp_path, recipe)
    (listed,) = list_source(Source("s3://bucket")).to_pylist()
    with video_copy({**listed, "write_id": "w"}, recipe, decoder, str(tmp_path)) as copy:
        units = decode_units(copy, recipe, decoder)
        rows = [next(units).to_pylist()[0]]
        decoder.close()
        rows += [unit.to_pylist()[0] for unit in units]
    assert len(rows) == 3
    assert without_figures(rows) == without_figures(near)


@pytest.mark.usefixtures("s3")
def test_a_video_that_cannot_be_fetched_is_a_row(tmp_path, decoder):
    video = {"video_id": "v", "uri": "s3://bucket/gone.mp4", "write_id": "w", "etag": "e", "size_bytes": 9 << 20}
    with video_copy(video, RECIPE, decoder, str(tmp_path)) as copy:
        (unit,) = decode_units(copy, RECIPE, decoder)
    assert unit["error_code"].to_pylist() == ["not_found"]
    assert [path.name for path in tmp_path.iterdir()] == []


# --- exact ---

FEW = IndexRecipe("few", TOWER, "uniform", 2, 20, num_segments=2, decode="exact")
NEAREST = replace(FEW, resize="nearest")
SLOW = {"preset": "medium", "bf": "3"}
OPEN = {"preset": "medium", "x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0:b-adapt=0"}
EXACTLY = {
    "plain.mp4": {},
    "b-frames.mp4": {"options": SLOW},
    "open.mp4": {"options": OPEN},
    "quick.mov": {"options": SLOW},
    "uneven.mp4": {"options": SLOW, "times_s": UNEVEN_S},
    "slow-start.mp4": {"options": SLOW, "times_s": SLOW_START_S},
    "hevc.mp4": {"codec": "libx265"},
    "hevc-open.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=20:open-gop=1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": QUICK_VP9},
    "turned.mp4": {"options": SLOW, "rotation": 90},
}


def assert_same_but_fewer_bytes(path, far, near, share=0.7):
    assert without_figures(far) == without_figures(near)
    assert [row["whole_because"] for row in far] == [None] * len(far)
    assert [row["error_code"] for row in far] == [None] * len(far)
    assert 0 < sum(row["read_bytes"] for row in far) < share * path.stat().st_size


@pytest.mark.parametrize("name", EXACTLY)
@pytest.mark.parametrize("recipe", [FEW, NEAREST], ids=["decoder", "nearest"])
def test_whole_groups_of_pictures_give_the_same_frames(tmp_path, s3, decoder, name, recipe):
    plain = write_clip(
        tmp_path / f"plain-{name}", 300, **{"gop": 20, "size": (160, 120), "audio_s": 5.0, **EXACTLY[name]}
    )
    path = remux(plain, tmp_path / name, movflags="faststart")
    far, near = watch(path, s3, decoder, tmp_path, recipe)
    assert_same_but_fewer_bytes(path, far, near)


@pytest.mark.parametrize("recipe", [FEW, NEAREST], ids=["decoder", "nearest"])
def test_frames_that_need_a_hidden_keyframe_are_the_same(tmp_path, s3, decoder, recipe):
    plain = write_clip(tmp_path / "plain.mp4", 300, times_s=UNEVEN_S, gop=20, size=(160, 120), options=SLOW)
    path = cut(plain, tmp_path / "cut.mp4", round(UNEVEN_S[67] * 90_000))
    assert_same_but_fewer_bytes(path, *watch(path, s3, decoder, tmp_path, recipe), share=0.8)


def test_where_most_groups_are_needed_the_whole_is_fetched(tmp_path, s3, decoder, monkeypatch):
    monkeypatch.setattr(sparse, "MAX_SHARE", 0.5)
    path = write_clip(tmp_path / "a.mp4", 300, gop=20, size=(160, 120), options=SLOW)
    far, near = watch(path, s3, decoder, tmp_path, replace(FEW, num_segments=10))
    assert without_figures(far) == without_figures(near)
    assert far[0]["whole_because"] == "most of it"


@pytest.mark.parametrize(
    ("name", "reason"), [("a.mkv", "no exact times of frames"), ("a.webm", "no exact times of frames")]
)
def test_where_the_index_does_not_tell_when_each_frame_is_shown_the_whole_is_fetched(
    tmp_path, s3, decoder, name, reason
):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_clip(tmp_path / name, 100, gop=20, codec=codec)
    far, near = watch(path, s3, decoder, tmp_path, FEW)
    assert without_figures(far) == without_figures(near)
    assert far[0]["whole_because"] == reason


@pytest.mark.parametrize("recipe", [FEW, NEAREST], ids=["decoder", "nearest"])
def test_pictures_that_are_damaged_are_the_same(tmp_path, s3, decoder, recipe):
    """In a group that is needed, one packet of noise and one of zeros."""
    path = write_clip(tmp_path / "a.mp4", 300, gop=20, size=(160, 120), options=SLOW)
    damage(path, 30, 30)
    damage(path, 195, 195, b"\0")
    far, near = watch(path, s3, decoder, tmp_path, recipe)
    assert without_figures(far) == without_figures(near)


@pytest.mark.parametrize("kind", [b"ctts", b"stts", b"stss", b"stco", b"elst"])
def test_a_damaged_index_costs_the_sparse_copy_and_no_more(tmp_path, s3, decoder, kind):
    path = write_clip(tmp_path / "a.mp4", 300, gop=20, size=(160, 120), options=SLOW)
    content = bytearray(path.read_bytes())
    place = content.index(kind) + 17
    content[place : place + 2] = b"\x01\x03"
    path.write_bytes(content)
    far, near = watch(path, s3, decoder, tmp_path, FEW)
    assert without_figures(far) == without_figures(near)


@pytest.mark.parametrize("options", [SLOW, OPEN], ids=["closed", "open"])
def test_keyframes_that_the_index_does_not_list_cost_the_sparse_copy(tmp_path, s3, decoder, options):
    """By what FFmpeg finds in the packets, frames are scaled in one way or another: this has to be as for the whole."""
    path = write_clip(tmp_path / "a.mp4", 300, gop=20, size=(160, 120), options=options)
    content = bytearray(path.read_bytes())
    place = content.index(b"stss") + 8
    listed = np.frombuffer(content, ">u4", int.from_bytes(content[place : place + 4], "big"), place + 4)[::3].tobytes()
    content[place : place + 4 + len(listed)] = (len(listed) // 4).to_bytes(4, "big") + listed
    path.write_bytes(content)
    far, near = watch(path, s3, decoder, tmp_path, FEW)
    assert without_figures(far) == without_figures(near)
    assert far[0]["whole_because"] == "decode_failed"


def test_a_decoder_that_dies_between_two_units_goes_on_with_the_same_groups(tmp_path, s3, decoder):
    path = write_clip(tmp_path / "a.mp4", 300, gop=20, size=(160, 120), options=SLOW)
    recipe = replace(FEW, num_segments=2, frames_per_segment=60)
    (_, near) = watch(path, s3, decoder, tmp_path, recipe)
    (listed,) = list_source(Source("s3://bucket")).to_pylist()
    with video_copy({**listed, "write_id": "w"}, recipe, decoder, str(tmp_path)) as copy:
        assert copy.is_sparse
        units = decode_units(copy, recipe, decoder)
        rows = [next(units).to_pylist()[0]]
        decoder.close()
        rows += [unit.to_pylist()[0] for unit in units]
        assert copy.is_sparse
    assert len(rows) == 2
    assert without_figures(rows) == without_figures(near)


def test_frames_that_lie_near_are_no_reason_for_a_sparse_copy():
    often = IndexRecipe("often", TOWER, "interval", 10, 20, segment_s=10.0)
    assert not may_need_little(often)
    assert may_need_little(replace(often, segment_s=600.0))
    assert may_need_little(replace(often, decode="keyframe"))
    assert may_need_little(FEW)


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS, "good/*.mp4"))
def test_real_files_give_the_same_exact_frames_whole_or_sparse(path, tmp_path, s3, decoder):
    far, near = watch(path, s3, decoder, tmp_path, replace(FEW, num_segments=1))
    assert without_figures(far) == without_figures(near)
    assert all(row["error_code"] is None for row in far)
    assert far[0]["whole_because"] in (None, "fragmented")


# --- what cannot be fetched ---


@pytest.mark.usefixtures("no_keys")
def test_a_large_video_without_keys_is_a_row(tmp_path, decoder, monkeypatch):
    monkeypatch.setattr(sparse, "MIN_BYTES", 4 << 20)
    video = {"video_id": "v", "uri": "s3://bucket/a.mp4", "write_id": "w", "etag": "e", "size_bytes": 9 << 20}
    with video_copy(video, RECIPE, decoder, str(tmp_path)) as copy:
        (unit,) = decode_units(copy, RECIPE, decoder)
    assert unit["error_code"].to_pylist() == ["credentials"]
    assert "renew its keys" in unit["error"][0].as_py()


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS, "good/*"))
def test_real_files_give_the_same_whole_or_sparse(path, tmp_path, s3, decoder):
    far, near = watch(path, s3, decoder, tmp_path, replace(RECIPE, segment_s=60.0))
    assert without_figures(far) == without_figures(near)
    assert all(row["error_code"] is None for row in far)
    assert np.sum([row["read_bytes"] for row in far]) > 0
    if "vfr" in path.name:
        assert far[0]["whole_because"] is None
