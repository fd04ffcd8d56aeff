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
from longvlm.pipeline.decode.video import DecodedFrames
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.timeline import VideoInfo

INFO = VideoInfo(num_frames=50, fps=25.0, duration_s=2.0, width=64, height=48, codec="h264", decoder="pyav")


def received(value):
    header, frames = messages.reply(value, 1.5)
    assert messages.read_length(header[: messages.LENGTH_BYTES]) == len(header) - messages.LENGTH_BYTES
    return messages.parse(header[messages.LENGTH_BYTES :]), frames


def test_facts_cross_whole():
    assert messages.read_video_info(received(INFO)[0]["value"]) == INFO


def test_frames_cross_as_bare_bytes():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    message, frames = received(DecodedFrames(pixels, (3, 9), "decord"))
    assert message["num_bytes"] == len(frames) == pixels.nbytes
    assert bytes(frames) == pixels.tobytes()
    assert messages.read_frame_numbers(message["value"], [3, 10]) == ((3, 9), "decord")


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
        messages.read_video_info(received(INFO)[0]["value"] | {field: value})


def test_a_video_that_claims_to_last_for_ages_is_a_failed_row():
    with pytest.raises(TerminalError, match="claims to last 11574 days") as caught:
        messages.read_video_info(received(INFO)[0]["value"] | {"duration_s": 1e9})
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


@pytest.fixture
def decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=300 << 20) as decoder:
        decoder.call(misdeeds.nothing)
        yield decoder


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
    monkeypatch.setattr(video, "decode", misdeeds.too_many_frames)
    with pytest.raises(TerminalError, match="frames of another size"):
        decoder.decode("a.mp4", [1], 8)
