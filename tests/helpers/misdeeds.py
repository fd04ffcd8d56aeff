"""What a hostile video might have its decoder do: called in the child through Decoder.call, which imports this."""

import ctypes
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path


class Bomb:
    """Runs code in whoever unpickles it."""

    def __reduce__(self):
        return print, ("BOOM",)


def _attempt(deed):
    try:
        deed()
    except OSError as error:
        return f"refused: {error.strerror}"
    return "done"


def nothing():
    return None


def process_id():
    return os.getpid()


def _write_to_parent(said):
    descriptor = int(sys.argv[1])
    while said:
        said = said[os.write(descriptor, said) :]


def say(said_in_hex):
    """Write to the parent what no reply is, and never come back."""
    _write_to_parent(bytes.fromhex(said_in_hex))
    time.sleep(600)


def trickle():
    """Announce a long message, and send it a byte at a time."""
    _write_to_parent((1 << 20).to_bytes(4, "little"))
    while True:
        _write_to_parent(b" ")
        time.sleep(0.01)


def shout_and_leave():
    for _ in range(4096):
        try:
            os.write(2, b"\x1b[31mwords " * 100)
        except OSError:  # more than a file may hold
            break
    os._exit(1)


def too_large_frames(path, frames, size, mode, resize):  # noqa: ARG001 - a stand-in for decode.decode
    import numpy as np

    from longvlm.pipeline.decode.video import DecodedFrames

    return DecodedFrames(np.zeros((1, 2 * size[0], size[1], 3), dtype=np.uint8), (1,), "pyav")


def limits():
    kinds = {"core": resource.RLIMIT_CORE, "file": resource.RLIMIT_FSIZE, "files": resource.RLIMIT_NOFILE}
    return {name: resource.getrlimit(kind)[1] for name, kind in kinds.items()}


def environment():
    return sorted(os.environ)


def open_a_socket():
    return _attempt(socket.socket)


def run_a_program():
    return _attempt(lambda: os.execv("/bin/true", ["true"]))


def fork():
    return _attempt(lambda: os._exit(0) if os.fork() == 0 else None)


def fork_by_clone3():
    """The call itself: libraries take it before clone."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_uint64 * 8)(0, 0, 0, 0, int(signal.SIGCHLD), 0, 0, 0)

    def clone():
        made = libc.syscall(435, arguments, ctypes.c_size_t(64))
        if made == 0:
            os._exit(0)
        if made < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return _attempt(clone)


def open_the_terminal():
    return _attempt(lambda: os.open("/dev/tty", os.O_RDONLY))


def type_into(descriptor):
    return _attempt(lambda: fcntl.ioctl(descriptor, termios.TIOCSTI, b"x"))


def kill_the_parent():
    return _attempt(lambda: os.kill(os.getppid(), 0))


def limit_the_parent():
    same = resource.getrlimit(resource.RLIMIT_CPU)
    return _attempt(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, same))


def hide_in_memory():
    return _attempt(lambda: os.memfd_create("hidden"))


def write(path):
    return _attempt(lambda: Path(path).write_text("overwritten"))


def append(path):
    return _attempt(lambda: os.open(path, os.O_RDONLY | os.O_APPEND | os.O_CREAT))


def open_all_rights(path):
    return _attempt(lambda: os.open(path, os.O_RDWR))


def remove(path):
    return _attempt(Path(path).unlink)


def rename(path):
    return _attempt(lambda: Path(path).rename(path + ".gone"))


def read(path):
    return Path(path).read_text()


def start_a_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append("done"))
    thread.start()
    thread.join()
    return done[0]


def read_environment_of_the_parent():
    return _attempt(Path(f"/proc/{os.getppid()}/environ").read_bytes)


def in_a_child(confined_by, *attempts):
    """The answers to attempts at misdeeds, (name, path), in a process that is confined by one means of `confine`.

    Or by "nothing", or by all of them, but for a device whose path is named.
    """
    code = f"""
import ctypes, misdeeds
from longvlm.pipeline import confine
libc = ctypes.CDLL(None, use_errno=True)
if {confined_by!r} == "landlock":
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert confine._restrict_with_landlock(libc)
elif {confined_by!r} != "nothing":
    confine.confine([{confined_by!r}])
for name, path in {attempts!r}:
    print(getattr(misdeeds, name)(path))
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()
