"""Bytes of a video for a player: one range of the file that was indexed, from a disk or a bucket, and of no other."""

import hashlib
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.pinned import Row, waiting
from longvlm.pipeline.source.copies import facts
from longvlm.pipeline.source.fetch import FetchError, WholeNeededError
from longvlm.pipeline.source.ranges import RemoteObject
from longvlm.pipeline.uris import is_local, local_path, refusals_as_sentences
from longvlm.schemas.errors import InputError

# What a player is told of a file; of others it looks itself, and if it cannot play them it says so.
_TYPES = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".mov": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
    ".avi": "video/x-msvideo",
    ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg",
    ".wmv": "video/x-ms-wmv",
}
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})|bytes=-(\d{1,15})", re.ASCII)
_at_once = threading.BoundedSemaphore(SERVE.media_at_once)


class ChangedError(InputError):
    """A video that is not there any more as it was indexed, in a sentence."""


class RangeError(Exception):
    """A range that the file does not have, or no single range."""


@dataclass(frozen=True)
class MediaFile:
    """The file of a live video as the ledger knows it."""

    uri: str
    etag: str | None
    size_bytes: int
    facts: Row  # etag, size_bytes and modified_at, as they were listed
    tag: str  # of its content, for players: it tells nothing of the file

    @property
    def content_type(self) -> str:
        """By the file's name."""
        return _TYPES.get(PurePosixPath(self.uri).suffix.lower(), "application/octet-stream")

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end), as many as an answer may have at most.

        Raises:
            ChangedError: the file is gone, or another stands in its place.
            InputError: it may not be read, or is out of reach.
            BusyError: too many are read at once.
        """
        assert end - start <= SERVE.media_bytes
        with waiting(_at_once), refusals_as_sentences("the video"):
            return self._read_local(start, end) if is_local(self.uri) else self._read_remote(start, end)

    def check_local(self) -> str:
        """The path of a file on this machine, once it is seen to be the one that was indexed. Raises ChangedError."""
        path = local_path(self.uri)
        try:
            self._check(path, Path(path).stat())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ChangedError("the video is not where it was indexed any more.") from error
        return path

    def _check(self, path: str, info: os.stat_result) -> None:
        now = facts({"name": path, "size": info.st_size, "mtime": info.st_mtime})
        is_same = all(self.facts[name] in (None, now[name]) for name in ("size_bytes", "modified_at"))
        if not is_same or not stat.S_ISREG(info.st_mode):
            raise ChangedError(_CHANGED)

    def _read_local(self, start: int, end: int) -> bytes:
        path = self.check_local()  # before it is opened: opening a pipe waits for whoever writes to it
        with Path(path).open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - start, start)
            self._check(path, os.fstat(file.fileno()))  # of what was read
        if len(data) != end - start:
            raise ChangedError(_CHANGED)
        return data

    def _read_remote(self, start: int, end: int) -> bytes:
        if not self.etag:
            raise ChangedError("its server gives no etag, by which it could be told from another file; play it there.")
        try:
            return RemoteObject(self.uri, self.etag).read([(start, end)])[0]
        except (WholeNeededError, FetchError) as error:
            raise ChangedError(_CHANGED) from error


_CHANGED = "the file has changed since it was indexed; index it again."


def media_file(video: Row) -> MediaFile:
    """The file of a row of the view live_videos."""
    known = {name: video[name] for name in ("etag", "size_bytes", "modified_at")}
    told = f"{video['write_id']} {known['etag']} {known['size_bytes']} {known['modified_at']}"
    tag = hashlib.sha256(told.encode()).hexdigest()[:32]
    return MediaFile(video["uri"], known["etag"], known["size_bytes"] or 0, known, tag)


def one_range(header: str, size_bytes: int) -> tuple[int, int]:
    """The range [start, end) that a Range header asks for, cut to what one answer may have.

    Raises:
        RangeError: there is none, there are several, or it is outside of the file.
    """
    found = _RANGE.fullmatch(header.strip())
    if not found or not size_bytes:
        raise RangeError
    if found[3] is not None:
        start, end = max(0, size_bytes - int(found[3])), size_bytes
    else:
        start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size_bytes, size_bytes)
    if start >= end:
        raise RangeError
    return start, min(end, start + SERVE.media_bytes)
