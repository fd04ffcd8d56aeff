"""Scratch disk space, which the decoders of a machine share with each other and with whatever else runs there."""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longvlm.pipeline.private import private_folder
from longvlm.schemas.errors import ErrorCode, TerminalError, TransientError

WAIT_S = 600.0  # for room that other decoders hold: about as long as one of them may keep a video
_POLL_S = 1.0
_ROOT = "longvlm-scratch-"  # and the number of the user: whose scratch folders these are
_YOUNG_S = 60.0  # a folder is without its lock for a moment after it was made


class ScratchFolder:
    """A scratch folder for copies of videos, which is removed when this object or its process does.

    A process that is killed leaves its folder behind, but not the lock on it: whoever makes a scratch folder next, or
    waits for room, removes those that nobody holds.

    Raises:
        PermissionError: the place in the temporary directory is another user's, or open to others.
    """

    def __init__(self, parent: str | None = None) -> None:
        root = private_folder(_ROOT, parent)
        _held_below(root)
        self.name = tempfile.mkdtemp(dir=root)
        lock = os.open(self.name, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.close = weakref.finalize(self, _remove, self.name, lock)  # at the latest when the process ends


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A scratch folder for as long as the body runs, by its path. Raises PermissionError as `ScratchFolder`."""
    folder = ScratchFolder()
    try:
        yield folder.name
    finally:
        folder.close()


@contextmanager
def draft_file(path: Path) -> Iterator[None]:
    """Hold a name under which a file is made, and remove at the end what stands there still.

    The lock is on a file beside it, `NAME.lock`, for programs that make the file themselves. Drafts in this folder with
    names of the same beginning, whose lock nobody holds because their maker was killed, are removed first.

    Args:
        path: of the file: a beginning, `-`, and what nobody else has.
    """
    for left in path.parent.glob(f"{path.name.partition('-')[0]}-*.lock"):
        _remove_if_unheld(left)
    beside = path.with_name(f"{path.name}.lock")
    lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        _remove_draft(beside)
        os.close(lock)


def _remove_if_unheld(beside: Path) -> None:
    """Remove a draft and its lock file, if its maker is gone."""
    with suppress(OSError):  # it went meanwhile, or is another user's
        lock = os.open(beside, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(lock).st_mtime > _YOUNG_S:
                _remove_draft(beside)
        finally:
            os.close(lock)


def _remove_draft(beside: Path) -> None:
    draft = beside.with_name(beside.name.removesuffix(".lock"))
    for path in (draft, draft.with_name(f"{draft.name}.wal"), beside):  # a database may have a log of its own
        path.unlink(missing_ok=True)


@contextmanager
def scratch_file(folder: str, suffix: str) -> Iterator[str]:
    """A new empty scratch file, by its path; it is removed at the end."""
    descriptor, path = tempfile.mkstemp(dir=folder, prefix="video-", suffix=suffix)
    os.close(descriptor)
    try:
        yield path
    finally:
        Path(path).unlink()


def has_room(num_bytes: int, folder: str) -> bool:
    """Whether so much is free now on the disk of a scratch folder."""
    return shutil.disk_usage(folder).free >= num_bytes


def await_room(num_bytes: int, folder: str) -> None:
    """Wait until so much is free on the disk of a scratch folder.

    Waits only for what the decoders of other scratch folders hold, because they will give it back.

    Raises:
        TerminalError: TOO_LARGE for the whole disk.
        TransientError: NO_SPACE, because of other things or for longer than `WAIT_S`.
    """
    if num_bytes > shutil.disk_usage(folder).total:
        raise TerminalError(
            ErrorCode.TOO_LARGE, f"The file has {num_bytes / 1e9:.1f} GB, more than the whole scratch disk."
        )
    root = Path(folder).parent
    deadline = time.monotonic() + WAIT_S
    while shutil.disk_usage(folder).free < num_bytes:
        held = _held_below(root) if root.name.startswith(_ROOT) else 0  # first, for it may make room
        free = shutil.disk_usage(folder).free
        if free < num_bytes and (free + held < num_bytes or time.monotonic() > deadline):
            raise no_space(num_bytes)
        time.sleep(_POLL_S)


def no_space(num_bytes: int) -> TransientError:
    """The error of a file for which there is no room now."""
    return TransientError(
        ErrorCode.NO_SPACE,
        f"The scratch disk has no room for {num_bytes / 1e9:.1f} GB; give it more, or run fewer decoders at a time.",
    )


def _held_below(root: Path) -> int:
    """Bytes in scratch folders that somebody holds; the others are removed."""
    held = 0
    for folder in root.iterdir():
        with suppress(FileNotFoundError):  # it went meanwhile
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held += sum(path.stat().st_blocks * 512 for path in folder.iterdir())
            else:
                if time.time() - os.fstat(lock).st_mtime > _YOUNG_S:
                    shutil.rmtree(folder, ignore_errors=True)  # another may be at it, too
            finally:
                os.close(lock)
    return held


def _remove(folder: str, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
