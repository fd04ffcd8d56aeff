import hashlib

import numpy as np
import pytest
from reference_outputs import REFERENCE_PX, clip_cases, read_json

from clips import damage, is_upright, read_number, write_clip
from longvlm.pipeline.decode import video as decoding
from longvlm.pipeline.decode.sampling import uniform_indices, upsample_positions
from longvlm.pipeline.decode.video import DecodedFrames, decode, probe, resize_nearest
from longvlm.schemas.errors import ErrorCode, TerminalError
from support import GOLDENS, VIDEOS, cases, lent, missing

WANTED = [0, 5, 6, 30, 30, 31, 77, 120, 121, 199]
SLOW = {"preset": "medium"}


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    decoding.close_video()


@pytest.fixture
def without_decord(monkeypatch):
    monkeypatch.setattr(decoding, "find_spec", lambda _: None)


CLIPS = {
    "h264.mp4": {},
    "h264-b-frames.mp4": {"options": {**SLOW, "bf": "3"}},
    "h264-open-gop.mp4": {"options": {**SLOW, "x264-params": "open-gop=1:keyint=12:bframes=3"}},
    "hevc-open-gop.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12:open-gop=1"}},
    "h264.mkv": {},
    "h264.flv": {},
    "h264.ts": {},
    "h264.h264": {},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg4-b-frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "wmv2.wmv": {"codec": "wmv2"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "vfr.mp4": {"times_s": [number * number / 500 for number in range(200)]},
    "10-bit.mp4": {"pix_fmt": "yuv420p10le"},
}


def numbers(decoded):
    return [read_number(frame) for frame in decoded.frames]


@pytest.mark.parametrize("name", CLIPS)
def test_exact_frames_are_the_ones_asked_for(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    assert probe(path).num_frames == 200
    decoded = decode(path, WANTED, 64)
    assert numbers(decoded) == WANTED
    assert decoded.shown == tuple(WANTED)
    assert numbers(decode(path, [3, 122], 64)) == [3, 122]  # and back again


@pytest.mark.usefixtures("without_decord")
@pytest.mark.parametrize("name", CLIPS)
def test_exact_frames_without_decord(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    decoded = decode(path, WANTED, 64)
    assert decoded.decoder == "pyav"
    assert numbers(decoded) == WANTED
    assert numbers(decode(path, [199], 64)) == [199]
    assert numbers(decode(path, list(range(40, 60)), 64)) == list(range(40, 60))


@pytest.mark.parametrize("name", CLIPS)
def test_keyframes_say_which_they_are(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    assert probe(path, "keyframe").num_frames == 200
    decoded = decode(path, WANTED, 64, "keyframe")
    index_counts_in_file_order = 3 if "open-gop" in name else 0
    for shown, number in zip(numbers(decoded), decoded.shown, strict=True):
        assert abs(shown - number) <= index_counts_in_file_order
    assert list(decoded.shown) == sorted(decoded.shown)
    assert max(abs(shown - wanted) for shown, wanted in zip(decoded.shown, WANTED, strict=True)) <= 15
    assert len(set(decoded.shown)) > 5


def test_a_broken_keyframe_turns_to_exact_frames(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 60, gop=10)
    damage(path, 30, 30, b"\0")
    assert probe(str(path), "keyframe").num_frames == 60
    for _ in range(2):
        assert numbers(decode(str(path), [5, 28, 55], 64, "keyframe")) == [5, 28, 55]


def test_decord_is_the_default_and_pyav_gives_the_same_pixels(tmp_path, monkeypatch):
    path = str(write_clip(tmp_path / "a.mp4", 60, size=(640, 360), noise=40))
    through_decord = decode(path, list(range(60)), 56)
    assert through_decord.decoder == "decord"
    monkeypatch.setattr(decoding, "find_spec", lambda _: None)
    probe(path)
    through_pyav = decode(path, list(range(60)), 56)
    assert through_pyav.decoder == "pyav"
    difference = np.abs(through_decord.frames.astype(int) - through_pyav.frames)
    assert difference.mean() < 0.1
    assert difference.max() <= 8


@pytest.mark.parametrize("name", ["h264-open-gop.mp4", "hevc-open-gop.mp4", "mpeg2.ts", "wmv2.wmv"])
def test_pyav_takes_over_where_decord_gives_wrong_frames(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    assert decode(path, WANTED, 64).decoder == "pyav"


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("resize", ["decoder", "nearest"])
def test_rotation_is_honoured(tmp_path, rotation, name, mode, resize):
    path = str(write_clip(tmp_path / name, 30, size=(96, 64), rotation=rotation))
    info = probe(path, mode)
    assert (info.width, info.height) == (96, 64)
    decoded = decode(path, [0, 12, 29], 64, mode, resize)
    assert all(is_upright(frame) for frame in decoded.frames)
    assert numbers(decoded) == list(decoded.shown)


def test_one_frame_is_a_video(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 1))
    info = probe(path)
    assert (info.num_frames, info.duration_s) == (1, pytest.approx(0.04))
    for mode in ("exact", "keyframe"):
        assert numbers(decode(path, [0, 0, 0], 64, mode)) == [0, 0, 0]


def test_the_video_stays_open_between_units(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 50))
    probe(path)
    video = decoding._OPEN[0]
    decode(path, [1], 64)
    decode(path, [2], 64)
    assert [video] == decoding._OPEN
    decode(str(write_clip(tmp_path / "b.mp4", 5)), [1], 64)
    assert len(decoding._OPEN) == 1


def test_frames_and_numbers_have_to_agree():
    with pytest.raises(ValueError, match="2 numbers"):
        DecodedFrames(np.zeros((3, 8, 8, 3), dtype=np.uint8), (1, 2), "pyav")


@pytest.mark.parity
def test_nearest_resize_is_the_references():
    name = "spatial_nearest_to_224"
    for case in read_json("sampling.json").get(name) or missing(GOLDENS, name):
        rows, columns = np.meshgrid(np.arange(case["h"]), np.arange(case["w"]), indexing="ij")
        resized = resize_nearest(np.stack([rows, columns], axis=-1), REFERENCE_PX)
        assert resized[:, 0, 0].tolist() == case["row_source"]
        assert resized[0, :, 1].tolist() == case["col_source"]


@pytest.mark.parity
@pytest.mark.parametrize("reference", clip_cases())
def test_frames_at_224_are_the_references(reference):
    meta = reference.meta
    if reference.video:
        decoded = decode(str(reference.video), meta["indices"], 56, resize="nearest")
        assert decoded.shown == tuple(meta["indices"])
        frames = decoded.frames
    else:
        sampled = uniform_indices(meta["total_frames"], meta["num_frames"])
        assert sampled == meta["indices"]
        upsampled = [sampled[position] for position in upsample_positions(len(sampled), meta["num_frames"])]
        frames = np.stack(
            [resize_nearest(reference.arrays["video_frames"][number], REFERENCE_PX) for number in upsampled]
        )
    assert list(frames.shape) == meta["frames224_shape"]
    assert hashlib.sha256(np.ascontiguousarray(frames)).hexdigest() == meta["frames224_sha256"]


@pytest.mark.corpus
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("path", cases(VIDEOS / "good", "*"))
def test_real_clips_decode(path, mode):
    info = probe(str(path), mode)
    num_frames = min(info.num_frames, 500)
    decoded = decode(str(path), uniform_indices(num_frames, 100), 56, mode)
    assert decoded.frames.shape == (min(num_frames, 100), 56, 56, 3)
    assert 0.03 < info.duration_s < 400
    assert 1 < info.fps < 61


FACTS = {
    "mediabunny__rotate-buck-bunny.mp4": {"width": 1080, "height": 1920},
    "torchcodec__nasa_13013.mp4": {"width": 480, "height": 270, "num_frames": 390},  # of two streams
    "media__hdr10-av1.mp4": {"codec": "av1", "num_frames": 127},
    "mediabunny__annex-b-avc.mkv": {"duration_s": pytest.approx(35.2, abs=0.1)},  # which its header does not say
}


@pytest.mark.corpus
@pytest.mark.parametrize("name", FACTS)
def test_facts_of_real_clips(name):
    info = probe(str(lent(VIDEOS / "good" / name)))
    assert {fact: getattr(info, fact) for fact in FACTS[name]} == FACTS[name]


MUST_FAIL = {
    "corrupted_moov.mp4": ErrorCode.DECODE_FAILED,
    "encrypted_cenc.mp4": ErrorCode.ENCRYPTED,
    "header_only_no_samples.mp4": ErrorCode.NO_FRAMES,
    "random_bytes.mp4": ErrorCode.NOT_A_VIDEO,
    "text_renamed.mp4": ErrorCode.NOT_A_VIDEO,
    "truncated_faststart_half.mp4": ErrorCode.TRUNCATED,
    "truncated_no_moov.mp4": ErrorCode.TRUNCATED,
    "zero_bytes.mp4": ErrorCode.EMPTY_FILE,
}
MUST_DECODE = {"webm_named.mp4", "fragmented_bogus_duration.mp4"}


@pytest.mark.corpus
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("path", cases(VIDEOS / "bad", "*"))
def test_bad_files_end_with_a_code_or_decode(path, mode):
    try:
        info = probe(str(path), mode)
        decoded = decode(str(path), uniform_indices(info.num_frames, 100), 56, mode)
    except TerminalError as caught:
        failure = caught
    else:
        failure = None
        assert info.duration_s < 60
        assert len(decoded.shown) == min(info.num_frames, 100)
    if path.name in MUST_FAIL or path.name in MUST_DECODE:
        assert (failure and failure.code) == MUST_FAIL.get(path.name)
    if failure:
        assert failure.message[0].isupper()
        assert failure.message.endswith(".")
