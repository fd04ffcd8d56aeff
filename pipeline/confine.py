"""The sandbox of a child process: the rights it drops before it meets what a stranger made, so that this gains little.

A decoder opens videos in one, and chat templates of checkpoints are rendered in one.

Linux is asked for what needs no rights and can never be taken back: limits, no capabilities, a system call filter
(seccomp) and Landlock. Each that the kernel refuses is left out, and the answer says so.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_MAX_FILE_BYTES = 1 << 20  # what libraries print goes to an open file; nothing else may be written
_MAX_OPEN_FILES = 256
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 1 << 2  # of a worker that runs as root: it may have to read what is not its own
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # everywhere, as are all that came after 424
_LANDLOCK_BENEATH, _WRITE_FILE = 1, 1 << 1
_LANDLOCK_VERSION = 1
_WRITE_FILES = 0b1_1111_1111_0010  # Landlock's access rights of its first version, but execute, read and list

# Refused: (number on x86-64, on arm64), None where there is no such call.
_NETWORK = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
}  # fmt: skip
_PROCESSES = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "unshare": (272, 97), "setns": (308, 268),
}  # fmt: skip
_FILES = {
    "creat": (85, None), "truncate": (76, 45), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "memfd_create": (319, 279), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
}  # fmt: skip
_KERNEL = {
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "reboot": (169, 142), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
}  # fmt: skip
_REFUSED = (_NETWORK, _PROCESSES, _FILES, _KERNEL)
_FIRST_REFUSED_NEW, _ALLOWED_SINCE = 424, (436, 439)  # refused: io_uring, pidfds ...; not: close_range, faccessat2
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_OPEN, _OPENAT, _CLONE, _IOCTL = (2, None), (257, 56), (56, 220), (16, 29)
_KEYSTROKES = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX put them into a terminal
_OF_OTHERS = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}  # fine where they mean the caller
_CLONE_THREAD = 0x10000
_X32 = 0x40000000  # the calls of a second x86-64 ABI start here

# Classic BPF: what an instruction does (linux/bpf_common.h), and what the filter answers (linux/seccomp.h).
_LOAD, _EQUALS, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_EPERM, _ENOSYS = 0x00050000 | 1, 0x00050000 | 38


_KEPT_ENV = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")  # and what begins with:
_KEPT_ENV_PREFIXES = ("LC_", "LD_", "DYLD_", "PYTHON")


def isolated_python(code: str, *args: str) -> list[str]:
    """The command of this Python, isolated (-I), that runs code with `sys.argv[1:]` as given.

    Its parent's path comes after its own: a worker's holds the folder that a job was started in, where somebody's
    types.py would be taken for Python's.
    """
    package = sys.modules[__name__.partition(".")[0]]
    path = [str(Path(package.__path__[0]).parent), *filter(None, sys.path)]
    return [sys.executable, "-I", "-c", f"import sys; sys.path += {path!r}; {code}", *args]


def safe_environment() -> dict[str, str]:
    """The variables of the environment that a child may know which meets hostile data: no credential is among them."""
    return {
        name: value for name, value in os.environ.items() if name in _KEPT_ENV or name.startswith(_KEPT_ENV_PREFIXES)
    }


def confine(devices: Sequence[str] = ()) -> list[str]:
    """Sandbox this process: drop what its work does not need, for good and all threads to come; returns what holds now.

    "limits": no core dump, no file larger than 1 MB, 256 open files. "seccomp": no sockets, no processes or programs,
    no opening of files for writing, no signals to others, nothing typed into a terminal. "landlock": no reading of
    other processes' memory and environment, no writing, and (from Linux 6.7 on) no TCP. "capabilities": a worker that
    is root has a child that is not, but for reading.

    Args:
        devices: paths of device files that may be opened for reading and writing all the same, where Landlock holds.
    """
    for limit, enough in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        most = resource.getrlimit(limit)[1]
        value = enough if most == resource.RLIM_INFINITY else min(enough, most)
        resource.setrlimit(limit, (value, value))
    holds = ["limits"]
    if not sys.platform.startswith("linux"):
        return holds
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return holds
    if _drop_capabilities(libc):
        holds.append("capabilities")
    if _restrict_with_landlock(libc, devices):
        holds.append("landlock")
    if _filter_system_calls(libc, may_open_devices="landlock" in holds and bool(devices)):
        holds.append("seccomp")
    return holds


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Keep none of root's special rights but to read."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: their lower halves, then the upper
    if libc.capget(header, sets) != 0:
        return False
    permitted = struct.unpack("=6I", sets.raw)[1] & _CAP_DAC_READ_SEARCH
    return bool(libc.capset(header, struct.pack("=6I", permitted, permitted, 0, 0, 0, 0)) == 0)


def _restrict_with_landlock(libc: ctypes.CDLL, devices: Sequence[str] = ()) -> bool:
    """A ruleset without a rule but for devices: whatever it handles is refused.

    What it cannot reach is other processes, too.
    """
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if version < 1:
        return False
    writing = _WRITE_FILES | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)  # refer, truncate
    fields = [writing]
    if version >= 4:
        fields.append(0b11)  # bind and connect TCP
    if version >= 6:
        fields.append(0b11)  # abstract Unix sockets and signals, of others
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for path in devices:
        descriptor = os.open(path, os.O_PATH)
        beneath = struct.pack("=Qi", _WRITE_FILE, descriptor)
        libc.syscall(_LANDLOCK_ADD, ctypes.c_long(ruleset), _LANDLOCK_BENEATH, beneath, 0)
        os.close(descriptor)
    held = libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_long(ruleset), 0) == 0
    os.close(ruleset)
    return bool(held)


def _filter_system_calls(libc: ctypes.CDLL, *, may_open_devices: bool) -> bool:
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return False
    program = b"".join(_program(*_ARCHITECTURES[platform.machine()], may_open_devices=may_open_devices))
    held = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(held))
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0) == 0)


def _program(audit_arch: int, column: int, *, may_open_devices: bool = False) -> Iterator[bytes]:
    """The filter, eight bytes an instruction; `column` is that of the architecture in the tables above.

    It sees no paths: where devices may be opened, reading and writing at once is left to Landlock, which does.
    """
    yield _instruction(_LOAD, 4)  # the architecture
    yield _instruction(_EQUALS, audit_arch, 1, 0)
    yield _instruction(_RETURN, _KILL)
    yield _instruction(_LOAD, 0)  # the number of the call
    yield from _return_if(_AT_LEAST, _X32, _EPERM)
    for number in _ALLOWED_SINCE:
        yield from _return_if(_EQUALS, number, _ALLOW)
    # "No such call" rather than "forbidden": libraries then do without; clone3 turns into clone, which can be judged.
    yield from _return_if(_AT_LEAST, _FIRST_REFUSED_NEW, _ENOSYS)
    for calls in _REFUSED:
        for numbers in calls.values():
            if (refused := numbers[column]) is not None:
                yield from _return_if(_EQUALS, refused, _EPERM)
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (0 if may_open_devices else os.O_RDWR)
    for numbers, argument in ((_OPEN, 1), (_OPENAT, 2)):
        yield from _filter_argument(
            numbers[column], argument, [_instruction(_HAS_BITS, writing, 0, 1), _instruction(_RETURN, _EPERM)]
        )
    yield from _filter_argument(
        _CLONE[column], 0, [_instruction(_HAS_BITS, _CLONE_THREAD, 1, 0), _instruction(_RETURN, _EPERM)]
    )
    typing = [line for request in _KEYSTROKES for line in _return_if(_EQUALS, request, _EPERM)]
    yield from _filter_argument(_IOCTL[column], 1, typing)
    for name, numbers in _OF_OTHERS.items():
        own = [_instruction(_EQUALS, os.getpid(), 1, 0), _instruction(_RETURN, _EPERM)]
        if name == "prlimit64":  # 0 is the caller, too
            own = [_instruction(_EQUALS, 0, 2, 0), *own]
        yield from _filter_argument(numbers[column], 0, own)
    yield _instruction(_RETURN, _ALLOW)


def _filter_argument(number: int | None, argument: int, verdict: list[bytes]) -> Iterator[bytes]:
    """A call judged by the lower half of one of its arguments; what the verdict does not refuse is allowed."""
    if number is not None:
        yield _instruction(_EQUALS, number, 0, len(verdict) + 2)
        yield _instruction(_LOAD, 16 + 8 * argument)
        yield from verdict
        yield _instruction(_RETURN, _ALLOW)


def _return_if(test: int, value: int, answer: int) -> Iterator[bytes]:
    yield _instruction(test, value, 0, 1)
    yield _instruction(_RETURN, answer)


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_so, if_not, value)
