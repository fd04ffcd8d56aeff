import io
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clips import damage, read_number, write_clip, write_still
from longvlm.pipeline.decode import units
from longvlm.pipeline.decode.copy import video_copy
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import uniform_indices
from longvlm.pipeline.decode.units import decode_units, failed_unit
from longvlm.pipeline.source import sparse
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import IndexRecipe, paper, tiny
from longvlm.schemas.tables import FRAMES
from longvlm.schemas.tower import TowerSpec
from support import VIDEOS, cases

TOWER = TowerSpec("tower", "w", 4, (4, 4), 64, 56, has_cls=True, search_dim=None)
MANY_UNITS = IndexRecipe("many", TOWER, "interval", 40, 20, segment_s=2.0)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=1500 << 20) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def second_decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=1500 << 20) as decoder:
        yield decoder


@pytest.fixture
def one_second_decoder(second_decoder, monkeypatch):
    """The decoder that tries whether frames come out the same again is started once for many videos, not for each."""

    @contextmanager
    def fresh(*_):
        yield second_decoder
        second_decoder.close_video()

    monkeypatch.setattr(units, "Decoder", fresh)


def planned(uri):
    return {"video_id": "v", "uri": str(uri), "write_id": "w", "attempts": 0, "etag": None}


def units_of(video, recipe, decoder, scratch, **settings):
    with video_copy(video, recipe, decoder, str(scratch)) as copy:
        return list(decode_units(copy, recipe, decoder, **settings))


def rows_of(uri, recipe, decoder, scratch, **settings):
    tables = units_of(planned(uri), recipe, decoder, scratch, **settings)
    assert all(table.schema == FRAMES and table.num_rows == 1 for table in tables)
    return [table.to_pylist()[0] for table in tables]


def frames_of(row):
    return np.frombuffer(row["frames"], dtype=np.uint8).reshape(-1, row["frame_height"], row["frame_width"], 3)


def test_the_papers_recipe_is_one_unit(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 250)
    (row,) = rows_of(path, paper(TOWER), decoder, tmp_path)
    assert (row["unit"], row["num_units"], row["num_segments"]) == (0, 1, 10)
    assert (row["video_id"], row["write_id"], row["error_code"]) == ("v", "w", None)
    assert (row["num_frames"], row["width"], row["height"], row["codec"]) == (250, 96, 64, "h264")
    assert row["decoder"] == "pyav"
    assert row["duration_s"] == pytest.approx(10.0)
    assert row["decode_ms"] > 0
    frames = frames_of(row)
    assert frames.shape == (100, 56, 56, 3)
    numbers = [frame for segment in row["segments"] for frame in segment["frames"]]
    assert [read_number(frame) for frame in frames] == numbers
    assert numbers == uniform_indices(250, 100)


def test_a_long_video_is_many_units(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 250)
    rows = rows_of(path, MANY_UNITS, decoder, tmp_path)
    assert [row["unit"] for row in rows] == [0, 1, 2]
    assert {row["num_units"] for row in rows} == {3}
    segments = [segment for row in rows for segment in row["segments"]]
    assert [segment["segment"] for segment in segments] == list(range(5))
    assert [(segment["start_s"], segment["end_s"]) for segment in segments] == [
        (2.0 * i, 2.0 * i + 2) for i in range(5)
    ]
    for row in rows:
        numbers = [frame for segment in row["segments"] for frame in segment["frames"]]
        assert [read_number(frame) for frame in frames_of(row)] == numbers


def test_thumbnails_show_the_middle_of_a_segment_in_the_shape_of_its_video(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 100, size=(96, 64))
    (row,) = rows_of(path, tiny(TOWER), decoder, tmp_path, has_thumbnails=True)
    assert len(row["segments"]) > 1
    for segment in row["segments"]:
        picture = np.asarray(Image.open(io.BytesIO(segment["thumbnail"])))
        assert picture.shape == (107, 160, 3)
        assert read_number(picture) == segment["frames"][len(segment["frames"]) // 2]
        assert len(segment["thumbnail"]) < 8000
    (plain,) = rows_of(path, tiny(TOWER), decoder, tmp_path)
    assert [segment["thumbnail"] for segment in plain["segments"]] == [None] * len(row["segments"])


def test_letterboxed_thumbnails_keep_their_black(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 25)
    (row,) = rows_of(path, tiny(PAIRS), decoder, tmp_path, has_thumbnails=True)
    picture = np.asarray(Image.open(io.BytesIO(row["segments"][0]["thumbnail"])))
    assert picture.shape == (80, 160, 3)
    assert picture[:, :15].max() < 30


def test_nearest_frames_are_224_whatever_the_tower_takes(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 20)
    (row,) = rows_of(path, replace(tiny(TOWER), resize="nearest"), decoder, tmp_path)
    assert (row["frame_height"], row["frame_width"]) == (224, 224)
    assert row["decoder"] == "pyav"
    assert len(row["frames"]) == len(row["segments"][0]["frames"]) * 224 * 224 * 3


PAIRS = replace(
    TOWER, patch_grid=(2, 4), image_size=(64, 128), aspect="letterbox", frames_per_picture=2, has_positions=True
)


def test_pictures_of_two_frames_are_counted_and_their_frames_fill_a_size_that_is_no_square(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 85)  # 3.4 s: a segment of four frames, and a tail of three
    (row,) = rows_of(path, tiny(PAIRS), decoder, tmp_path)
    assert [len(segment["frames"]) for segment in row["segments"]] == [4, 3]
    assert row["num_pictures"] == 4  # the last frame of the tail is a picture by itself
    assert (row["frame_height"], row["frame_width"], row["width"], row["height"]) == (64, 128, 96, 64)
    frames = frames_of(row)
    assert frames.shape == (7, 64, 128, 3)
    assert not frames[:, :, :16].any()
    assert not frames[:, :, 112:].any()
    numbers = [frame for segment in row["segments"] for frame in segment["frames"]]
    assert [read_number(frame[:, 16:112]) for frame in frames] == numbers


@pytest.mark.parametrize("recipe", [paper(TOWER), tiny(TOWER), tiny(PAIRS)], ids=["paper", "tiny", "pairs"])
@pytest.mark.parametrize("decode", ["exact", "keyframe"])
def test_times_are_when_frames_are_shown(tmp_path, decoder, recipe, decode):
    times_s = [number / 25 if number < 40 else 1.6 + (number - 40) / 5 for number in range(60)]
    path = write_clip(tmp_path / "a.mp4", 60, times_s=times_s, gop=10)
    rows = rows_of(path, replace(recipe, decode=decode), decoder, tmp_path)
    assert rows[0]["decoder"] == ("pyav" if decode == "exact" else "pyav-keyframes")
    for segment in (segment for row in rows for segment in row["segments"]):
        assert segment["times_s"] == pytest.approx([times_s[number] for number in segment["frames"]])
        assert segment["start_s"] <= segment["times_s"][-1] < segment["end_s"]


def test_frames_that_are_spread_are_decoded_in_segments_of_so_many(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 100, gop=30)
    recipe = IndexRecipe("s", TOWER, "spread", 2, 8, max_frames=5, frames_per_s=2.0)
    (row,) = rows_of(path, recipe, decoder, tmp_path)
    assert [segment["frames"] for segment in row["segments"]] == [[0, 24], [49, 74], [99]]
    assert [read_number(frame) for frame in frames_of(row)] == [0, 24, 49, 74, 99]
    assert [segment["end_s"] for segment in row["segments"]] == pytest.approx([1.96, 3.96, 4.0])
    (row,) = rows_of(path, replace(recipe, decode="keyframe"), decoder, tmp_path)  # at 0, 30, 60 and 90
    assert [segment["frames"] for segment in row["segments"]] == [[0, 30], [60, 60], [90]]
    assert row["keyframe_shift_s"] == pytest.approx(14 * 0.04)


def test_keyframes_widen_the_segments_that_they_stand_for(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 100, gop=45)  # keyframes at 0, 1.8 and 3.6 s
    (row,) = rows_of(path, replace(tiny(TOWER), decode="keyframe"), decoder, tmp_path)
    assert [segment["frames"] for segment in row["segments"]] == [[0, 0, 45, 45], [45, 90, 90, 90]]
    assert [segment["start_s"] for segment in row["segments"]] == [0.0, 1.8]
    assert [segment["end_s"] for segment in row["segments"]] == [2.0, 4.0]
    assert [read_number(frame) for frame in frames_of(row)] == [0, 45, 90]  # each once, however often it is shown
    assert (row["decoder"], row["keyframe_shift_s"]) == ("pyav-keyframes", pytest.approx(0.88))  # 90 for 68


def test_keyframes_farther_apart_than_a_segment_will_not_do(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 100, gop=100)
    (row,) = rows_of(path, replace(tiny(TOWER), decode="keyframe"), decoder, tmp_path)
    assert [segment["frames"] for segment in row["segments"]] == [[6, 18, 31, 43], [56, 68, 81, 93]]
    assert [read_number(frame) for frame in frames_of(row)] == [6, 18, 31, 43, 56, 68, 81, 93]
    assert (row["decoder"], row["keyframe_shift_s"]) == ("pyav", None)


def test_a_failure_at_once_is_one_row(tmp_path, decoder):
    (tmp_path / "a.mp4").touch()
    (row,) = rows_of(tmp_path / "a.mp4", paper(TOWER), decoder, tmp_path)
    assert (row["unit"], row["num_units"], row["error_code"]) == (0, 1, "empty_file")
    assert row["error"] == "The file is empty (0 bytes); upload it again."
    assert (row["segments"], row["frames"], row["num_frames"]) == ([], None, None)
    (row,) = rows_of(tmp_path / "gone.mp4", paper(TOWER), decoder, tmp_path)
    assert row["error_code"] == "not_found"


def test_a_failure_later_on_ends_with_the_failed_unit(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 250)
    damage(path, 130, 249)
    rows = rows_of(path, MANY_UNITS, decoder, tmp_path)
    assert [row["error_code"] for row in rows] == [None, "decode_failed"]
    assert [row["unit"] for row in rows] == [0, 1]
    assert {row["num_units"] for row in rows} == {3}
    assert "damaged" in rows[1]["error"]


def test_a_deadline_fails_the_video_and_no_other(tmp_path):
    slow = write_still(tmp_path / "slow.mp4", 150, (1280, 720))
    quick = write_clip(tmp_path / "quick.mp4", 10)
    with Decoder(deadline_s=0.05, memory_limit_bytes=1500 << 20) as decoder:
        (row,) = rows_of(slow, paper(TOWER), decoder, tmp_path)
        assert row["error_code"] == "deadline"
        assert row["decode_ms"] > 0
        decoder.deadline_s = 60
        (row,) = rows_of(quick, paper(TOWER), decoder, tmp_path)
        assert row["error_code"] is None


def test_remote_videos_are_fetched_and_removed(tmp_path, decoder, s3):
    clip = write_clip(tmp_path / "a.mp4", 50)
    s3.upload_file(str(clip), "bucket", "v/a.mp4")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (listed,) = list_source(Source("s3://bucket/v")).to_pylist()
    with video_copy({**listed, "write_id": "w"}, paper(TOWER), decoder, str(scratch)) as copy:
        units = decode_units(copy, paper(TOWER), decoder)
        row = next(units).to_pylist()[0]
        assert (row["num_frames"], row["read_bytes"], row["whole_because"]) == (50, clip.stat().st_size, None)
        assert len(list(scratch.iterdir())) == 1
        assert next(units, None) is None
    assert list(scratch.iterdir()) == []
    (row,) = rows_of("s3://bucket/gone.mp4", paper(TOWER), decoder, scratch)
    assert row["error_code"] == "not_found"


def test_a_planned_video_can_be_failed_without_watching():
    row = failed_unit(planned("/a.mp4"), TerminalError(ErrorCode.LOST, "Three workers died.")).to_pylist()[0]
    assert (row["video_id"], row["error_code"], row["error"]) == ("v", "lost", "Three workers died.")
    assert (row["unit"], row["num_units"], row["decode_ms"]) == (0, 1, 0.0)


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS, "bad/*"))
def test_bad_files_cost_nobody_else(path, tmp_path, decoder):
    rows = rows_of(path, tiny(TOWER), decoder, tmp_path)
    assert all(row["error_code"] is None for row in rows[:-1])
    good = write_clip(tmp_path / "a.mp4", 10)
    (row,) = rows_of(good, tiny(TOWER), decoder, tmp_path)
    assert row["error_code"] is None


def test_what_its_entry_in_the_source_told_is_the_outcome(tmp_path, decoder):
    listed = {**planned(str(tmp_path / "a.mp4")), "error_code": "bad_entry", "error": "its name is none."}
    (unit,) = units_of(listed, paper(TOWER), decoder, tmp_path)
    assert (unit["error_code"][0].as_py(), unit["error"][0].as_py()) == ("bad_entry", "its name is none.")


# --- a long video whose rest one decoder leaves to others: together they give what one alone gives, bit for bit ---

FIVE_UNITS = IndexRecipe("five", TOWER, "uniform", 20, 20, num_segments=25)
UNEVEN_S = [number / 25 + 0.3 * (number // 7) for number in range(300)]


def watched(video, recipe, decoder, scratch, **settings):
    return [unit.to_pylist()[0] for unit in units_of(video, recipe, decoder, scratch, **settings)]


def shared(video, recipe, decoder, scratch, per_part=1):
    """The rows of a video that is left to others as soon as it may be, a decoder's after the other's, latest first."""
    first = watched(video, recipe, decoder, scratch, long_decode_s=0.0)
    parts = []
    for start in range(len(first), first[0]["num_units"], per_part):
        part = video | {"first_unit": start, "end_unit": min(start + per_part, first[0]["num_units"])}
        parts.insert(0, watched(part, recipe, decoder, scratch))
    return [first, *parts]


def without_figures(rows):
    plain = {"decode_ms": 0.0, "read_bytes": 0, "whole_because": None, "rest_ms": None}
    return sorted((row | plain for row in rows), key=lambda row: row["unit"])


@pytest.mark.usefixtures("one_second_decoder")
@pytest.mark.parametrize("decode", ["exact", "keyframe"])
@pytest.mark.parametrize("times_s", [None, UNEVEN_S], ids=["even", "uneven-turned"])
@pytest.mark.parametrize("recipe", [FIVE_UNITS, MANY_UNITS], ids=["five", "often"])
def test_parts_are_what_one_decoder_gives(tmp_path, decoder, recipe, times_s, decode):
    options = {"preset": "medium", "bf": "3"}
    turned = 90 if times_s else 0
    path = write_clip(tmp_path / "a.mp4", 300, times_s=times_s, options=options, gop=40, rotation=turned)
    recipe = replace(recipe, decode=decode)
    whole = watched(planned(path), recipe, decoder, tmp_path)
    first, *parts = shared(planned(path), recipe, decoder, tmp_path)
    assert [row["unit"] for row in first] == [0, 1]
    assert first[0]["rest_ms"] is None
    assert first[1]["rest_ms"] > 0
    assert len(parts) == len(whole) - 2
    assert without_figures([row for part in [first, *parts] for row in part]) == without_figures(whole)


def test_what_is_not_long_enough_is_not_left(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 300)
    rows = watched(planned(path), FIVE_UNITS, decoder, tmp_path, long_decode_s=600.0)
    assert [row["rest_ms"] for row in rows] == [None] * 5


def test_a_part_is_left_to_nobody_and_neither_is_what_one_decoder_shall_watch_alone(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 300)
    part = planned(path) | {"first_unit": 2, "end_unit": 5}
    assert [row["unit"] for row in watched(part, FIVE_UNITS, decoder, tmp_path, long_decode_s=0.0)] == [2, 3, 4]
    alone = planned(path) | {"end_unit": 2**31 - 1}
    assert len(watched(alone, FIVE_UNITS, decoder, tmp_path, long_decode_s=0.0)) == 5


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.avi", "mpeg4")])
def test_what_can_only_be_read_in_order_is_not_left(tmp_path, decoder, name, codec):
    path = write_clip(tmp_path / name, 300, codec=codec)
    rows = watched(planned(path), FIVE_UNITS, decoder, tmp_path, long_decode_s=0.0)
    assert [row["rest_ms"] for row in rows] == [None] * 5


def test_a_file_that_gives_other_pixels_after_a_seek_is_not_left(tmp_path, decoder):
    """Intra refresh has no keyframe but the first, and the container may call any frame one."""
    options = {"preset": "medium", "bf": "0", "intra-refresh": "1", "x264-params": "keyint=40"}
    path = write_clip(tmp_path / "a.mp4", 300, gop=40, noise=30, options=options)
    whole = watched(planned(path), FIVE_UNITS, decoder, tmp_path)
    [rows] = shared(planned(path), FIVE_UNITS, decoder, tmp_path)
    assert without_figures(rows) == without_figures(whole)


def test_a_decoder_that_gives_something_else_the_second_time_goes_on_alone(tmp_path, decoder, monkeypatch):
    class Different(Decoder):
        def decode(self, *args):
            decoded = super().decode(*args)
            decoded.frames[-1, 0, 0] += 1
            return decoded

    monkeypatch.setattr(units, "Decoder", Different)
    path = write_clip(tmp_path / "a.mp4", 300)
    rows = watched(planned(path), FIVE_UNITS, decoder, tmp_path, long_decode_s=0.0)
    assert [row["rest_ms"] for row in rows] == [None] * 5


def test_a_part_of_a_file_that_was_replaced_fails(tmp_path, decoder):
    path = write_clip(tmp_path / "a.mp4", 300)
    (listed,) = list_source(Source(str(path))).to_pylist()
    part = listed | {"write_id": "w", "first_unit": 2, "end_unit": 3}
    assert [row["error_code"] for row in watched(part, FIVE_UNITS, decoder, tmp_path)] == [None]
    os.utime(path, (1, 1))
    (row,) = watched(part, FIVE_UNITS, decoder, tmp_path)
    assert row["error_code"] == "network"
    assert "replaced while" in row["error"]
    (row,) = watched(planned(path) | {"first_unit": 7, "end_unit": 8}, FIVE_UNITS, decoder, tmp_path)
    assert "replaced by a shorter one" in row["error"]


def test_of_a_remote_file_each_part_fetches_its_own(tmp_path, s3, decoder, monkeypatch):
    monkeypatch.setattr(sparse, "MIN_BYTES", 0)
    monkeypatch.setattr(sparse, "_WINDOW_BYTES", 1 << 10)
    path = write_clip(tmp_path / "a.mp4", 600, size=(160, 120), gop=20, noise=30)
    s3.upload_file(str(path), "bucket", "a.mp4")
    (listed,) = list_source(Source("s3://bucket")).to_pylist()
    whole = watched(planned(path), MANY_UNITS, decoder, tmp_path)
    first, *parts = shared(listed | {"write_id": "w"}, MANY_UNITS, decoder, tmp_path, per_part=2)
    assert sum(row["read_bytes"] for row in first) == path.stat().st_size
    told = [(row["video_id"], row["whole_because"], row["error_code"]) for part in parts for row in part]
    assert told == [(listed["video_id"], None, None)] * (len(whole) - 2)
    assert all(0 < sum(row["read_bytes"] for row in part) < path.stat().st_size / 2 for part in parts)
    rows = [row | {"video_id": "v"} for part in [first, *parts] for row in part]
    assert without_figures(rows) == without_figures(whole)


def test_a_part_of_a_remote_file_that_was_replaced_fails(tmp_path, s3, decoder):
    s3.upload_file(str(write_clip(tmp_path / "a.mp4", 300)), "bucket", "a.mp4")
    (listed,) = list_source(Source("s3://bucket")).to_pylist()
    part = listed | {"write_id": "w", "first_unit": 2, "end_unit": 3, "etag": "0" * 32}
    (row,) = watched(part, FIVE_UNITS, decoder, tmp_path)
    assert row["error_code"] == "network"


@pytest.mark.corpus
@pytest.mark.usefixtures("one_second_decoder")
@pytest.mark.parametrize("path", cases(VIDEOS, "good/*"))
def test_parts_of_real_files_are_what_one_decoder_gives(path, tmp_path, decoder):
    is_small = path.stat().st_size < 500_000  # each frame of the others, three times over, takes half a minute
    for decode in ("exact", "keyframe") if is_small else ("keyframe",):
        recipe = replace(FIVE_UNITS, decode=decode)
        whole = watched(planned(path), recipe, decoder, tmp_path)
        parts = shared(planned(path), recipe, decoder, tmp_path, per_part=2)
        assert without_figures([row for part in parts for row in part]) == without_figures(whole)
