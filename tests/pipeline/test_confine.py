"""What a decoder child can still do once it is confined: the attempts are made in real children."""

import errno
import os
import signal
import struct
import sys

import misdeeds
import pytest

from clips import write_clip
from longvlm.pipeline import confine
from longvlm.pipeline.decode.isolate import Decoder

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux confines")


@pytest.fixture(scope="module")
def decoder():
    with Decoder(deadline_s=60, memory_limit_bytes=1 << 30) as decoder:
        decoder.call(misdeeds.nothing)
        yield decoder


@pytest.fixture
def filtered(decoder):
    if "seccomp" not in decoder.confined:
        pytest.skip(f"the kernel has no system call filter for us; what holds: {decoder.confined}")
    return decoder


def test_limits_hold_everywhere(decoder):
    assert "limits" in decoder.confined
    assert decoder.call(misdeeds.limits) == {"core": 0, "file": 1 << 20, "files": 256}


@pytest.mark.parametrize(
    "misdeed",
    [
        "open_a_socket",
        "run_a_program",
        "fork",
        "fork_by_clone3",
        "kill_the_parent",
        "limit_the_parent",
        "hide_in_memory",
    ],
)
def test_a_child_that_was_taken_over_gets_nowhere(filtered, misdeed):
    assert "refused" in filtered.call(getattr(misdeeds, misdeed))


def test_no_file_is_written_changed_or_removed(filtered, tmp_path):
    victim = tmp_path / "a.txt"
    victim.write_text("precious")
    for misdeed in (misdeeds.write, misdeeds.append, misdeeds.remove, misdeeds.rename, misdeeds.open_all_rights):
        assert "refused" in filtered.call(misdeed, str(victim)), misdeed.__name__
    assert "refused" in filtered.call(misdeeds.write, str(tmp_path / "new.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert victim.read_text() == "precious"


def test_the_filter_is_no_hindrance(filtered):
    assert filtered.call(misdeeds.read, __file__).startswith('"""What a decoder child')
    assert filtered.call(misdeeds.start_a_thread) == "done"


def test_other_processes_stay_unread(decoder):
    if not {"landlock", "capabilities"} <= set(decoder.confined):
        pytest.skip(f"the kernel has no Landlock; what holds: {decoder.confined}")
    assert "refused" in decoder.call(misdeeds.read_environment_of_the_parent)


def test_landlock_alone_keeps_files_safe(decoder, tmp_path):
    if "landlock" not in decoder.confined:
        pytest.skip(f"the kernel has no Landlock; what holds: {decoder.confined}")
    attempt = ("write", str(tmp_path / "a.txt"))
    (answer,) = misdeeds.in_a_child("landlock", attempt)
    assert "refused" in answer
    assert misdeeds.in_a_child("nothing", attempt) == ["done"]


def test_a_device_may_be_opened_and_nothing_else_be_written(decoder, tmp_path):
    if not {"landlock", "seccomp"} <= set(decoder.confined):
        pytest.skip(f"the kernel has no Landlock or no filter; what holds: {decoder.confined}")
    victim = tmp_path / "a.txt"
    victim.touch()
    attempts = (
        ("open_all_rights", "/dev/zero"),
        ("open_all_rights", "/dev/null"),
        ("open_all_rights", str(victim)),
        ("write", str(victim)),
        ("write", "/dev/zero"),
        ("remove", str(victim)),
    )
    allowed, *answers = misdeeds.in_a_child("/dev/zero", *attempts)
    assert allowed == "done"
    for attempt, answer in zip(attempts[1:], answers, strict=True):
        assert "refused" in answer, attempt


def test_nothing_is_typed_into_a_terminal(filtered):
    assert filtered.call(misdeeds.open_the_terminal) == "refused: No such device or address"  # it has none
    assert filtered.call(misdeeds.type_into, 0) == "refused: Operation not permitted"


def test_credentials_stay_with_the_parent(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Decoder(deadline_s=60, memory_limit_bytes=1 << 30) as decoder:
        assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & set(decoder.call(misdeeds.environment))


@pytest.mark.parametrize("mode", ["exact", "keyframe"])
@pytest.mark.parametrize("resize", ["decoder", "nearest"])
def test_decoding_goes_on(decoder, tmp_path, mode, resize):
    path = str(write_clip(tmp_path / "a.mp4", 50, gop=10))
    assert decoder.probe(path, mode).num_frames == 50
    decoded = decoder.decode(path, [0, 20, 40], (64, 64), mode, resize)
    assert decoded.shown == (0, 20, 40)
    assert decoded.decoder == ("pyav" if mode == "exact" else "pyav-keyframes")


def verdict(machine, number, *arguments):
    """What the filter answers to a call on an architecture that need not be this one: errno, 0 to let pass, or -1."""
    audit_arch, column = confine._ARCHITECTURES[machine]
    steps = [struct.unpack("HBBI", step) for step in confine._program(audit_arch, column)]
    known = struct.pack("<IIQ6Q", number, audit_arch, 0, *arguments, *[0] * (6 - len(arguments)))
    loaded, place = 0, 0
    while True:
        code, if_so, if_not, value = steps[place]
        place += 1
        if code == confine._RETURN:
            return {confine._ALLOW: 0, confine._KILL: -1}.get(value, value & 0xFFFF)
        if code == confine._LOAD:
            loaded = struct.unpack_from("<I", known, value)[0]
        else:
            tests = {
                confine._EQUALS: loaded == value,
                confine._AT_LEAST: loaded >= value,
                confine._HAS_BITS: loaded & value,
            }
            place += if_so if tests[code] else if_not


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_either_architecture(machine):
    column = confine._ARCHITECTURES[machine][1]
    for calls in confine._REFUSED:
        for name, numbers in calls.items():
            assert numbers[column] is None or verdict(machine, numbers[column]) == errno.EPERM, name
    judged = (confine._OPENAT, confine._CLONE, confine._OF_OTHERS["kill"], confine._OF_OTHERS["prlimit64"])
    openat, clone, kill, prlimit = (numbers[column] for numbers in judged)
    assert verdict(machine, openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == 0
    for flags in (
        os.O_WRONLY,
        os.O_RDWR,
        os.O_CREAT,
        os.O_TRUNC,
        os.O_RDONLY | os.O_APPEND,
        os.O_WRONLY | os.O_TMPFILE,
    ):
        assert verdict(machine, openat, 0, 0, flags) == errno.EPERM
    threads = 0x3D0F00  # what glibc asks of clone for a thread
    assert (verdict(machine, clone, threads), verdict(machine, clone, signal.SIGCHLD)) == (0, errno.EPERM)
    for call in (kill, prlimit):
        assert (verdict(machine, call, os.getpid()), verdict(machine, call, os.getppid())) == (0, errno.EPERM)
    assert verdict(machine, prlimit, 0) == 0
    ioctl, push_a_key, window_size = confine._IOCTL[column], 0x5412, 0x5413
    assert (verdict(machine, ioctl, 0, push_a_key), verdict(machine, ioctl, 0, window_size)) == (errno.EPERM, 0)
    io_uring_setup, clone3, close_range, faccessat2, yet_to_come = 425, 435, 436, 439, 600
    assert {verdict(machine, number) for number in (io_uring_setup, clone3, yet_to_come)} == {errno.ENOSYS}
    assert {verdict(machine, number) for number in (close_range, faccessat2)} == {0}
    assert verdict(machine, {"x86_64": 0, "aarch64": 63}[machine]) == 0  # read
