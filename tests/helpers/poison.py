"""What a decoder may do to its process: called in the child through Decoder.call, by import."""

import ctypes
import os
import sys
import time
from pathlib import Path


def double(number):
    return 2 * number


def process_id():
    return os.getpid()


def modules():
    return sorted(sys.modules)


def peak_rss_mb():
    """Of this process alone: ru_maxrss starts from what the parent had when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def crash():
    os.write(2, b"the last words\n")
    ctypes.string_at(0)


def leave():
    os._exit(3)


def hang():
    time.sleep(600)


def burn(cpu_s):
    started = time.process_time()
    while time.process_time() - started < cpu_s:
        pass


def allocate(num_bytes):
    kept = []
    for _ in range(num_bytes >> 20):
        kept.append(b"x" * (1 << 20))
        time.sleep(0.001)
    return len(kept)


def fail():
    raise KeyError("an error without a code")


def hang_deaf():
    """Hang with the interpreter's lock held, where no signal handler and no thread of Python runs."""
    libc = ctypes.PyDLL(None)
    libc.sleep(600)
