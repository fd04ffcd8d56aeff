import hashlib
from fractions import Fraction

import numpy as np
import pytest
from reference_outputs import REFERENCE_PX, clip_cases, read_json

from clips import cut, damage, is_upright, read_number, remux, write_clip
from longvlm.pipeline.decode import video as decoding
from longvlm.pipeline.decode.sampling import uniform_indices, upsample_positions
from longvlm.pipeline.decode.scaling import resize_nearest
from longvlm.pipeline.decode.video import DecodedFrames, decode, probe
from longvlm.schemas.errors import ErrorCode, TerminalError
from support import GOLDENS, VIDEOS, cases, lent, missing

WANTED = [0, 5, 6, 30, 30, 31, 77, 120, 121, 199]
SLOW = {"preset": "medium"}


@pytest.fixture(autouse=True)
def _nothing_left_open():
    yield
    decoding.close_video()


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
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vfr.mp4": {"times_s": [number * number / 500 for number in range(200)]},
    "10-bit.mp4": {"pix_fmt": "yuv420p10le"},
}


def numbers(decoded):
    return [read_number(frame) for frame in decoded.frames[decoded.places]]


@pytest.mark.parametrize("name", CLIPS)
def test_exact_frames_are_the_ones_asked_for(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    assert probe(path).num_frames == 200
    decoded = decode(path, WANTED, (64, 64))
    assert numbers(decoded) == WANTED
    assert (decoded.shown, decoded.decoder) == (tuple(WANTED), "pyav")
    assert numbers(decode(path, [3, 122], (64, 64))) == [3, 122]  # and back again
    assert numbers(decode(path, [199], (64, 64))) == [199]
    assert numbers(decode(path, list(range(40, 60)), (64, 64))) == list(range(40, 60))


@pytest.mark.parametrize("name", CLIPS)
def test_keyframes_say_which_they_are(tmp_path, name):
    path = str(write_clip(tmp_path / name, 200, **CLIPS[name]))
    assert probe(path, "keyframe").num_frames == 200
    decoded = decode(path, WANTED, (64, 64), "keyframe")
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
        assert numbers(decode(str(path), [5, 28, 55], (64, 64), "keyframe")) == [5, 28, 55]


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("resize", ["decoder", "nearest"])
def test_rotation_is_honoured(tmp_path, rotation, name, mode, resize):
    path = str(write_clip(tmp_path / name, 30, size=(96, 64), rotation=rotation))
    info = probe(path, mode)
    assert (info.width, info.height) == (96, 64)
    decoded = decode(path, [0, 12, 29], (64, 64), mode, resize)
    assert all(is_upright(frame) for frame in decoded.frames)
    assert numbers(decoded) == list(decoded.shown)


def cut_losslessly(folder, name):
    source = write_clip(folder / f"whole{name[-4:]}", 200, gop=50, options={**SLOW, "bf": "3"})
    cut(source, folder / name, 135 * 512)
    return range(135, 200)


def with_empty_slots(folder, name):
    """An AVI of 50 slots a second, of which every other one is empty, and the last ten seconds."""
    source = write_clip(folder / "whole.avi", 100, codec="mpeg4", options={"bf": "2"}, gop=12)

    def spread(_, packet):
        packet.time_base = Fraction(1, 50)
        packet.dts, packet.pts = 2 * packet.dts, 2 * packet.pts
        return True

    remux(source, folder / name, spread)
    return range(100)


def in_decoding_order(folder, name):
    """H.264 with B-frames, stamped by its place in the file."""
    source = write_clip(folder / "whole.h264", 200, options={**SLOW, "bf": "3"})

    def count(number, packet):
        packet.time_base = Fraction(1, 25)
        packet.pts = packet.dts = number
        return True

    remux(source, folder / name, count)
    return range(200)


def thrice(folder, name):
    part = write_clip(folder / "part.ts", 60, options={**SLOW, "bf": "3"})
    (folder / name).write_bytes(part.read_bytes() * 3)
    return [*range(60)] * 3


def over_the_edge(folder, name):
    """A TS whose 33 bits of time are full after two seconds."""
    source = write_clip(folder / "part.ts", 100, options={**SLOW, "bf": "3"})
    start = (1 << 33) - 2 * 90_000 - 133_200

    def late(_, packet):
        packet.pts, packet.dts = packet.pts + start, packet.dts + start
        return True

    remux(source, folder / name, late, mpegts_copyts="1")
    return range(100)


def an_hour_on(folder, name):
    times_s = [number / 25 + (3600 if number >= 50 else 0) for number in range(100)]
    write_clip(folder / name, 100, times_s=times_s, options={**SLOW, "bf": "0"}, gop=25)
    return range(100)


MADE = {
    "cut.mp4": cut_losslessly,
    "cut.mov": cut_losslessly,
    "empty-slots.avi": with_empty_slots,
    "b-frames.avi": in_decoding_order,
    "b-frames.asf": in_decoding_order,
    "thrice.ts": thrice,
    "wraps.ts": over_the_edge,
    "jumps.ts": an_hour_on,
}


@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("name", MADE)
def test_one_timeline_out_of_any_stamps(tmp_path, name, mode):
    pictures = [*MADE[name](tmp_path, name)]
    path = str(tmp_path / name)
    info = probe(path, mode)
    assert info.num_frames == len(pictures)
    assert info.duration_s == pytest.approx(len(pictures) / 25, abs=0.05)
    assert info.times_ns.tolist() == pytest.approx([40_000_000 * i for i in range(len(pictures))], abs=21_000_000)
    wanted = sorted({0, 1, 2, 3, 4, 17, 30, 50, 51, 60, 61, len(pictures) - 1})
    decoded = decode(path, wanted, (64, 64), mode)
    assert numbers(decoded) == [pictures[number] for number in decoded.shown]
    assert mode == "keyframe" or list(decoded.shown) == wanted
    assert numbers(decode(path, [2, len(pictures) - 2], (64, 64))) == [pictures[2], pictures[-2]]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_picture_stays_until_the_next_one_comes(tmp_path, name):
    times_s = [*(i / 25 for i in range(125)), *range(5, 60, 5), *(60 + i / 25 for i in range(125))]
    path = str(write_clip(tmp_path / name, len(times_s), times_s=times_s, options={**SLOW, "bf": "3"}))
    info = probe(path)
    assert info.duration_s == pytest.approx(65, abs=1)
    moments = [0.5, 4.99, 5, 9.9, 31, 34.99, 35, 59.9, 60.02, 64]
    wanted = [sum(time_s <= moment + 1e-6 for time_s in times_s) - 1 for moment in moments]
    assert [info.frame_at(moment) for moment in moments] == wanted
    assert numbers(decode(path, wanted, (64, 64))) == wanted


@pytest.mark.parametrize(("max_gap_s", "decoder"), [(None, "pyav-keyframes"), (2.0, "pyav-keyframes"), (1.9, "pyav")])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_keyframes_that_lie_too_far_apart_will_not_do(tmp_path, name, max_gap_s, decoder):
    path = str(write_clip(tmp_path / name, 100, gop=50))
    probe(path, "keyframe", max_gap_s)
    decoded = decode(path, [10, 20, 70], (64, 64), "keyframe")
    assert decoded.decoder == decoder
    assert decoded.shown == ((10, 20, 70) if decoder == "pyav" else (0, 0, 50))
    assert numbers(decoded) == list(decoded.shown)


def test_the_nearest_keyframe_is_near_in_time(tmp_path):
    times_s = [*(i / 25 for i in range(50)), *(10 + i / 25 for i in range(50))]
    path = str(write_clip(tmp_path / "a.mp4", 100, times_s=times_s, gop=50))
    probe(path, "keyframe")
    assert decode(path, [20, 49], (64, 64), "keyframe").shown == (
        0,
        0,
    )  # 49 is a frame before the next, and eight seconds


def test_an_unknown_codec_says_so(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 5)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(TerminalError, match="nothing here decodes") as caught:
        probe(str(path))
    assert caught.value.code == ErrorCode.UNSUPPORTED_CODEC


@pytest.mark.parametrize(("unit", "is_alpha"), [(b"\x4e\x01\xa5\x04", True), (b"\x4e\x01\x89\x04", False)])
def test_hevc_with_alpha_says_so(tmp_path, unit, is_alpha):
    """A message of alpha, or another, beside the parameter sets of a video that cannot be decoded."""
    path = write_clip(tmp_path / "a.mp4", 5, codec="libx265")
    damage(path, 0, 4)
    content = path.read_bytes()
    place = content.index(b"hvcC") + 4
    # in place of the last parameter set's array, which the decoder of noise does not miss
    size = int.from_bytes(content[place - 8 : place - 4], "big") - 8
    parameters = bytearray(content[place : place + size])
    array = parameters.rindex(b"\x00\x01", 23) - 1
    room = size - array - 5
    parameters[array : array + 5] = bytes([39]) + b"\0\1" + room.to_bytes(2, "big")
    parameters[array + 5 :] = (unit + b"\x80" * room)[:room]
    path.write_bytes(content[:place] + bytes(parameters) + content[place + size :])
    with pytest.raises(TerminalError) as caught:
        probe(str(path))
    assert caught.value.code == (ErrorCode.UNSUPPORTED_CODEC if is_alpha else ErrorCode.DECODE_FAILED)
    assert ("alpha" in caught.value.message) == is_alpha


def test_every_error_of_a_decoder_is_a_sentence(tmp_path):
    source = write_clip(tmp_path / "whole.ts", 50, codec="mpeg4", gop=50)
    path = remux(source, tmp_path / "a.ts", lambda number, _: number > 0)
    with pytest.raises(TerminalError) as caught:
        probe(str(path))
    assert caught.value.code == ErrorCode.DECODE_FAILED
    assert caught.value.message.endswith(".")
    assert "Error" not in caught.value.message


def test_one_frame_is_a_video(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 1))
    info = probe(path)
    assert (info.num_frames, info.duration_s) == (1, pytest.approx(0.04))
    for mode in ("exact", "keyframe"):
        assert numbers(decode(path, [0, 0, 0], (64, 64), mode)) == [0, 0, 0]


def test_the_video_stays_open_between_units(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 50))
    probe(path)
    video = decoding._OPEN[0]
    decode(path, [1], (64, 64))
    decode(path, [2], (64, 64))
    assert [video] == decoding._OPEN
    decode(str(write_clip(tmp_path / "b.mp4", 5)), [1], (64, 64))
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
        decoded = decode(str(reference.video), meta["indices"], (56, 56), resize="nearest")
        assert decoded.shown == tuple(meta["indices"])
        frames = decoded.frames[decoded.places]
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
    num_frames = min(info.num_frames, 120)
    decoded = decode(str(path), uniform_indices(num_frames, 100), (56, 56), mode)
    assert decoded.frames.shape == (len({*decoded.shown}), 56, 56, 3)
    assert len(decoded.shown) == min(num_frames, 100)
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
        decoded = decode(str(path), uniform_indices(info.num_frames, 100), (56, 56), mode)
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


REPORTS = VIDEOS / "reports"
RIGHT = {
    "cut_elst.mp4": {"num_frames": 167, "duration_s": pytest.approx(6.7, abs=0.05)},
    "null_frames_remux.avi": {"duration_s": pytest.approx(12, abs=0.01)},
    "h264_bframes.avi": {"num_frames": 300, "duration_s": pytest.approx(12)},
    "vfr_screen.mp4": {"num_frames": 261, "duration_s": pytest.approx(65)},
    "slides20min.mp4": {"num_frames": 4, "duration_s": pytest.approx(3599.5, abs=0.6)},
    "cat3.ts": {"num_frames": 600, "duration_s": pytest.approx(24)},
    "matrix_hflip.mp4": {"width": 320, "height": 240},
    "matrix_vflip.mp4": {"width": 320, "height": 240},
    "real_zero_display_matrix.mp4": {"width": 320, "height": 240},
    "one_key.mp4": {"num_frames": 300, "duration_s": pytest.approx(12)},
}
REFUSED = {"unknown_codec.mp4": ErrorCode.UNSUPPORTED_CODEC, "mpeg4_without_header.ts": ErrorCode.DECODE_FAILED}


@pytest.mark.corpus
@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("path", [case for ending in ("mp4", "avi", "ts") for case in cases(REPORTS, f"*.{ending}")])
def test_files_that_people_reported_end_as_they_should(path, mode):
    if path.name in REFUSED:
        with pytest.raises(TerminalError) as caught:
            probe(str(path), mode)
        assert caught.value.code == REFUSED[path.name]
        assert caught.value.message.endswith(".")
        return
    info = probe(str(path), mode, max_gap_s=10.0)
    assert {fact: getattr(info, fact) for fact in RIGHT[path.name]} == RIGHT[path.name]
    wanted = sorted({*range(0, info.num_frames, 25), info.num_frames - 1})
    decoded = decode(str(path), wanted, (56, 56), mode)
    assert path.name != "one_key.mp4" or decoded.shown == tuple(wanted)


@pytest.mark.corpus
def test_slides_are_shown_each_at_its_time():
    path = str(lent(REPORTS / "slides20min.mp4"))
    info = probe(path)
    slides = [info.frame_at(moment) for moment in (0, 1199, 1200, 2399, 2400, 3598, 3599)]
    assert slides == [0, 0, 1, 1, 2, 2, 3]
    *coloured, white = decode(path, [0, 1, 2, 3], (56, 56)).frames.mean(axis=(1, 2))
    assert [int(colour.argmax()) for colour in coloured] == [0, 1, 2]  # red, green, blue
    assert white.min() > 200
