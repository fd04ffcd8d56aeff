import os
import signal
import subprocess
import sys
import time

import numpy as np
import poison
import psutil
import pytest

from clips import read_number, write_clip, write_still
from longvlm.pipeline.decode import isolate
from longvlm.pipeline.decode.isolate import Decoder
from longvlm.pipeline.decode.sampling import uniform_indices
from longvlm.schemas.errors import ErrorCode, TerminalError
from support import HELPERS, VIDEOS, cases

MB = 1 << 20


@pytest.fixture(scope="module")
def decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=1500 * MB) as decoder:
        yield decoder


def test_frames_come_back_through_the_child(decoder, tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", 50))
    info = decoder.probe(path)
    assert info.num_frames == 50
    decoded = decoder.decode(path, [3, 10, 10, 49], (64, 64))
    assert decoded.frames.shape == (3, 64, 64, 3)  # each once, however often it is asked for
    assert decoded.frames.dtype == np.uint8
    assert [read_number(frame) for frame in decoded.frames] == [3, 10, 49]
    assert (decoded.shown, decoded.places.tolist()) == ((3, 10, 10, 49), [0, 1, 1, 2])


def test_the_child_stays_small_and_alive(decoder):
    modules = decoder.call(poison.modules)
    assert not {"torch", "pyarrow", "fsspec", "pandas", "psutil", "ray"} & set(modules)
    assert decoder.call(poison.process_id) == decoder.call(poison.process_id) != os.getpid()


def test_cpu_time_is_counted_failures_included(decoder):
    before = decoder.cpu_ms
    decoder.call(poison.burn, 0.2)
    assert 190 < decoder.cpu_ms - before < 400


@pytest.fixture(scope="module")
def small_decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=300 * MB) as decoder:
        yield decoder


@pytest.mark.parametrize(
    ("poisonous", "args", "code", "words"),
    [
        (poison.crash, (), ErrorCode.DECODER_CRASHED, "SIGSEGV: the last words"),
        (poison.leave, (), ErrorCode.DECODER_CRASHED, "exit code 3"),
        (poison.hang, (), ErrorCode.DEADLINE, "not done after 1 s"),
        (poison.hang_deaf, (), ErrorCode.DEADLINE, "not done after 1 s"),
        (poison.burn, (60,), ErrorCode.DEADLINE, "not done after 1 s"),
        (poison.allocate, (4000 * MB,), ErrorCode.MEMORY_LIMIT, "more than 315 MB"),
    ],
)
def test_poison_costs_one_child_whose_time_is_counted(small_decoder, poisonous, args, code, words):
    assert small_decoder.call(poison.double, 21) == 42
    victim, before_ms = small_decoder.call(poison.process_id), small_decoder.cpu_ms
    small_decoder.deadline_s = 1 if code == ErrorCode.DEADLINE else 60
    with pytest.raises(TerminalError, match=words) as caught:
        small_decoder.call(poisonous, *args)
    small_decoder.deadline_s = 60
    assert caught.value.code == code
    assert poisonous is not poison.burn or small_decoder.cpu_ms - before_ms > 100  # busy machines give it a part
    assert not psutil.pid_exists(victim)
    assert small_decoder.call(poison.double, 4) == 8
    assert small_decoder.call(poison.process_id) != victim


def test_an_error_without_a_code_gets_one(decoder):
    child = decoder.call(poison.process_id)
    with pytest.raises(TerminalError, match="KeyError") as caught:
        decoder.call(poison.fail)
    assert caught.value.code == ErrorCode.DECODE_FAILED
    assert decoder.call(poison.process_id) == child


def test_a_child_found_dead_is_replaced_without_an_error(decoder):
    child = decoder.call(poison.process_id)
    os.kill(child, signal.SIGKILL)
    psutil.Process(child).wait() if child in {p.pid for p in psutil.Process().children()} else None
    assert decoder.call(poison.double, 1) == 2


def test_a_child_is_replaced_after_many_videos(tmp_path, monkeypatch):
    monkeypatch.setattr(isolate, "_VIDEOS_PER_CHILD", 2)
    path = str(write_clip(tmp_path / "a.mp4", 5))
    children = []
    with Decoder(deadline_s=10, memory_limit_bytes=300 * MB) as decoder:
        for _ in range(3):
            decoder.probe(path)
            children.append(decoder.call(poison.process_id))
    assert children[0] == children[1] != children[2]


def test_closing_ends_the_child():
    decoder = Decoder(deadline_s=10, memory_limit_bytes=300 * MB)
    child = decoder.call(poison.process_id)
    decoder.close()
    assert not psutil.pid_exists(child)


ORPHAN = """
import os, poison
from longvlm.pipeline.decode.isolate import Decoder
decoder = Decoder(60, 1 << 30)
print(decoder.call(poison.process_id), flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_child_ends_with_its_parent():
    env = {**os.environ, "PYTHONPATH": str(HELPERS)}
    parent = subprocess.run([sys.executable, "-c", ORPHAN], env=env, capture_output=True, text=True, check=False)
    child = int(parent.stdout)
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("the child outlived its parent")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_100_frames_of_a_1080p_file_take_less_than_250_mb(tmp_path):
    path = str(write_still(tmp_path / "a.mp4", 130, (1920, 1080), fps=12))
    with Decoder(deadline_s=60, memory_limit_bytes=1500 * MB) as decoder:
        for mode in ("exact", "keyframe"):
            info = decoder.probe(path, mode)
            assert info.duration_s > 10
            decoded = decoder.decode(path, uniform_indices(info.num_frames, 100), (224, 224), mode)
            assert decoded.frames.shape == (len({*decoded.shown}), 224, 224, 3)
            assert len(decoded.shown) == 100
        decoder.decode(path, uniform_indices(info.num_frames, 100), (224, 224), "exact", "nearest")
        assert decoder.call(poison.peak_rss_mb) < 250


@pytest.mark.corpus
@pytest.mark.parametrize("path", cases(VIDEOS / "good", "*1080p*") + cases(VIDEOS / "good", "*rotate*"))
def test_real_1080p_clips_take_less_than_250_mb(path):
    with Decoder(deadline_s=60, memory_limit_bytes=1500 * MB) as decoder:
        info = decoder.probe(str(path))
        decoder.decode(str(path), uniform_indices(min(info.num_frames, 300), 100), (224, 224))
        assert decoder.call(poison.peak_rss_mb) < 250
