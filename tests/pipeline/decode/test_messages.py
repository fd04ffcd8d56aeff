"""What a parent makes of what its decoder child says: a child that was taken over may say anything."""

import json
import pickle

import misdeeds
import numpy as np
import psutil
import pytest

from longvlm.pipeline.decode import messages, video
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.messages import InvalidMessageError
from longvlm.pipeline.decode.times import MAX_FRAMES, TimedVideo
from longvlm.pipeline.decode.video import DecodedFrames
from longvlm.schemas.errors import ErrorCode, TerminalError

TIMES_NS = np.arange(50) * 40_000_000
INFO = TimedVideo(50, 25.0, 2.0, 64, 48, "h264", "pyav", TIMES_NS)


def received(value):
    header, frames = messages.reply(value, 1.5)
    assert messages.read_length(header[: messages.LENGTH_BYTES]) == len(header) - messages.LENGTH_BYTES
    return messages.parse(header[messages.LENGTH_BYTES :]), frames


def test_facts_cross_whole_and_times_as_bare_bytes():
    message, data = received(INFO)
    assert message["num_bytes"] == len(data) == 400
    times_ns = messages.room_for_times(message)
    times_ns.data.cast("B")[:] = data
    video = messages.read_video(message["value"], times_ns)
    assert video.facts == INFO.facts
    assert video.times_ns.tolist() == TIMES_NS.tolist()


def test_two_hours_at_60_a_second_cross():
    times_ns = np.arange(432_000) * 16_666_667
    message, data = received(TimedVideo(432_000, 60.0, 7200.01, 64, 48, "h264", "pyav", times_ns))
    assert len(data) == 3_456_000
    assert messages.room_for_times(message).nbytes == len(data)


@pytest.mark.parametrize(
    "times_ns",
    [
        TIMES_NS[:49],
        TIMES_NS + 1,  # the first is not 0
        TIMES_NS[::-1],
        np.where(TIMES_NS[7] == TIMES_NS, TIMES_NS[6], TIMES_NS),  # two at once
        TIMES_NS * 2,  # beyond the end
        np.zeros(50, dtype=np.int64),
    ],
)
def test_times_that_no_frames_have(times_ns):
    with pytest.raises(InvalidMessageError):
        messages.read_video(received(INFO)[0]["value"], times_ns)


@pytest.mark.parametrize("num_frames", [MAX_FRAMES + 1, -1, 1.5, True, "50", None])
def test_no_room_is_made_for_any_number_of_times(num_frames):
    for value in ({"num_frames": num_frames}, None, [num_frames]):
        with pytest.raises(InvalidMessageError):
            messages.room_for_times({"value": value})


def test_frames_cross_as_bare_bytes():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    message, frames = received(DecodedFrames(pixels, (3, 9), "pyav"))
    assert message["num_bytes"] == len(frames) == pixels.nbytes
    assert bytes(frames) == pixels.tobytes()
    assert messages.read_frame_numbers(message["value"], [3, 10]) == ((3, 9), "pyav", None)
    message, _ = received(DecodedFrames(pixels, (3, 9), "pyav", "codec\nav1"))
    assert messages.read_frame_numbers(message["value"], [3, 10]) == ((3, 9), "pyav", "codec av1")


def test_errors_cross_as_one_line():
    error = TerminalError(ErrorCode.TRUNCATED, "cut off\n\x1b[31m" + "x" * 5000)
    again = messages.read_error(received(error)[0])
    assert type(again) is TerminalError
    assert again.code == ErrorCode.TRUNCATED
    assert again.message.startswith("cut off  [31mxxx")
    assert len(again.message) == 1000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_frames", 0), ("num_frames", 1.5), ("num_frames", 10**12), ("num_frames", "50"), ("num_frames", True),
        ("fps", 0), ("fps", float("nan")), ("fps", float("inf")), ("duration_s", -1), ("duration_s", None),
        ("duration_s", 10**400), ("width", -1), ("more", 1),
    ],
)  # fmt: skip
def test_facts_that_cannot_be(field, value):
    with pytest.raises(InvalidMessageError):
        messages.read_video(received(INFO)[0]["value"] | {field: value}, TIMES_NS)


def test_a_video_that_claims_to_last_for_ages_is_a_failed_row():
    with pytest.raises(TerminalError, match="claims to last 11574 days") as caught:
        messages.read_video(received(INFO)[0]["value"] | {"duration_s": 1e9}, TIMES_NS)
    assert caught.value.code == ErrorCode.DECODE_FAILED


@pytest.mark.parametrize(
    "numbers", [[1], [1, 2, 3], [2, 1], [1, -1], [1, 2**40], [1, "2"], [1, 2.0], [1, True], None, "12"]
)
def test_frames_that_were_not_asked_for(numbers):
    with pytest.raises(InvalidMessageError):
        messages.read_frame_numbers({"shown": numbers, "decoder": "pyav"}, [1, 2])


def test_text_that_is_no_message():
    for text in (pickle.dumps(INFO), b"[1]", b"[" * 100_000, b"9" * 5000, b"\xff", b""):
        with pytest.raises(InvalidMessageError):
            messages.parse(text)
    with pytest.raises(InvalidMessageError, match="4294967295 bytes"):
        messages.read_length(b"\xff\xff\xff\xff")
    for message in ({"error": "x"}, {"error": "x", "code": "new"}, {"error": "x", "code": ["network"]}):
        with pytest.raises(InvalidMessageError):
            messages.read_error(message)


@pytest.fixture(scope="module")
def one_decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=300 << 20) as decoder:
        yield decoder


@pytest.fixture
def decoder(one_decoder):
    """A decoder whose child is alive and imported what it will be asked to do."""
    one_decoder.deadline_s = 60
    one_decoder.call(misdeeds.nothing)
    return one_decoder


def serialise(message):
    text = message if isinstance(message, bytes) else json.dumps(message).encode()
    return len(text).to_bytes(messages.LENGTH_BYTES, "little") + text


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (pickle.dumps(misdeeds.Bomb()), ErrorCode.DECODER_CRASHED),
        (serialise(pickle.dumps(misdeeds.Bomb())), ErrorCode.DECODER_CRASHED),
        (b"\xff\xff\xff\xff", ErrorCode.DECODER_CRASHED),
        (serialise({"value": None}), ErrorCode.DECODER_CRASHED),
        (serialise({"value": None, "cpu_ms": float("nan")}), ErrorCode.DECODER_CRASHED),
        (serialise({"value": None, "cpu_ms": 1, "num_bytes": 1 << 40}), ErrorCode.DECODER_CRASHED),
        (serialise({"error": "x", "code": "x", "cpu_ms": 1}), ErrorCode.DECODER_CRASHED),
        (serialise({"value": None, "cpu_ms": 1})[:-3], ErrorCode.DEADLINE),  # and then silence
    ],
)
def test_a_child_whose_reply_is_malformed_costs_its_video_and_itself(decoder, said, code, capfd):
    victim = decoder.call(misdeeds.process_id)
    if code == ErrorCode.DEADLINE:
        decoder.deadline_s = 1
    with pytest.raises(TerminalError) as caught:
        decoder.call(misdeeds.say, said.hex())
    decoder.deadline_s = 60
    assert caught.value.code == code
    assert not psutil.pid_exists(victim)
    assert "BOOM" not in capfd.readouterr().out
    assert decoder.call(misdeeds.process_id) != victim


def test_a_child_that_trickles_is_ended_at_the_deadline(decoder):
    decoder.deadline_s = 1
    with pytest.raises(TerminalError, match="not done after 1 s") as caught:
        decoder.call(misdeeds.trickle)
    assert caught.value.code == ErrorCode.DEADLINE


def test_last_words_are_short(decoder):
    with pytest.raises(TerminalError) as caught:
        decoder.call(misdeeds.shout_and_leave)
    assert caught.value.code == ErrorCode.DECODER_CRASHED
    assert len(caught.value.message) < 1200
    assert caught.value.message.isprintable()


def test_frames_of_another_size_are_refused(decoder, monkeypatch):
    monkeypatch.setattr(video, "decode", misdeeds.too_large_frames)
    with pytest.raises(TerminalError, match="frames of another size"):
        decoder.decode("a.mp4", [1], (8, 8))
