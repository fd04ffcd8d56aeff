from dataclasses import replace

import numpy as np
import pytest

from clips import cut, damage, remux, write_clip
from longvlm.pipeline.decode.copy import video_copy
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.units import decode_units
from longvlm.pipeline.source import sparse
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas.recipe import IndexRecipe
from longvlm.schemas.tower import TowerSpec
from support import VIDEOS, cases

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
    sound = {} if name.endswith("webm") else {"audio_s": 2.0}
    plain = write_clip(tmp_path / f"plain{name[1:]}", 600, size=(160, 120), codec=codec, gop=100, **sound)
    path = plain.rename(tmp_path / name) if codec == "libvpx-vp9" else remux(plain, tmp_path / name, **options)
    far, near = watch(path, s3, decoder, tmp_path)
    assert without_figures(far) == without_figures(near)
    assert {row["decoder"] for row in far} == {"pyav-keyframes"}
    assert [row["whole_because"] for row in far] == [None] * len(far)
    assert 0 < sum(row["read_bytes"] for row in far) < path.stat().st_size
    assert sum(row["read_bytes"] for row in near) == 0


UNEVEN_S = [number / 25 + 0.3 * (number // 7) for number in range(600)]


@pytest.mark.parametrize("name", ["plain.mp4", "cut.mp4"])
def test_a_variable_frame_rate_is_no_reason_to_fetch_the_whole(tmp_path, s3, decoder, name):
    options = {"preset": "medium", "bf": "3"}
    path = write_clip(tmp_path / "plain.mp4", 600, size=(160, 120), times_s=UNEVEN_S, options=options, gop=100)
    if name == "cut.mp4":
        path = cut(path, tmp_path / name, round(UNEVEN_S[130] * 90_000))
    far, near = watch(path, s3, decoder, tmp_path)
    assert without_figures(far) == without_figures(near)
    assert {row["decoder"] for row in far} == {"pyav-keyframes"}
    assert [row["whole_because"] for row in far] == [None] * len(far)
    first = UNEVEN_S[130] if name == "cut.mp4" else 0.0
    number = far[0]["num_frames"] - 1
    assert far[0]["duration_s"] == pytest.approx(UNEVEN_S[599] - first, abs=0.6)
    assert number == 599 - (130 if name == "cut.mp4" else 0)
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
