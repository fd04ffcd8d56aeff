"""Files wherever fsspec reaches: what they are called, and a local copy of one while it is decoded."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import ErrorCode, InputError, PipelineError, TerminalError, TransientError

MAX_OBJECT_BYTES = 64 << 30  # a download that is larger is not a video to watch, or not on this machine
DOWNLOAD_TRIES = 3
_BACKOFF_S = 1.0  # doubled after each try


def locate(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path in it. Local files need no scheme.

    Raises:
        InputError: nothing here speaks the URI's protocol.
    """
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    if is_local(uri):
        return LocalFileSystem(), local_path(uri)
    try:
        return url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"cannot open {uri}: {error}; install what its protocol needs, or check the address."
        ) from error


def is_local(uri: str) -> bool:
    """Whether a URI is a plain path or file://."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path that a local URI means."""
    path = Path(uri.removeprefix("file://")).expanduser()
    return os.path.abspath(path)  # noqa: PTH100 - resolve() follows links, and a link is a name of its own


def canonical_uri(fs: Any, path: str) -> str:
    """The one spelling of a file's address: an absolute path for local files, else with the scheme."""
    uri = str(fs.unstrip_protocol(path))
    return uri.removeprefix("file://")


def facts(info: dict[str, Any]) -> dict[str, Any]:
    """Etag, size and time of change out of a filesystem's answer, whatever it calls them."""
    etag = info.get("ETag") or info.get("etag")
    if info.get("islink") and Path(info["name"]).exists():  # a change of the file, not of the link, counts
        info = {**info, "mtime": Path(info["name"]).stat().st_mtime}
    changed = next(
        (info[key] for key in ("LastModified", "last_modified", "updated", "mtime", "created") if info.get(key)), None
    )
    if isinstance(changed, str):
        changed = datetime.fromisoformat(changed)
    if isinstance(changed, int | float):
        changed = datetime.fromtimestamp(changed, UTC)
    if changed is not None and changed.tzinfo is not None:
        changed = changed.astimezone(UTC).replace(tzinfo=None)
    return {"etag": etag.strip('"') if etag else None, "size_bytes": info.get("size"), "modified_at": changed}


@contextmanager
def local_copy(uri: str, scratch_dir: str) -> Iterator[str]:
    """The path of a file to read: local files in place, others downloaded for as long as the context lasts.

    Raises:
        TerminalError: NOT_FOUND, FORBIDDEN, or TOO_LARGE for `MAX_OBJECT_BYTES` or the scratch disk.
        TransientError: NETWORK, after `DOWNLOAD_TRIES`.
    """
    if is_local(uri):
        path = local_path(uri)
        _check_readable(path)
        yield path
        return
    descriptor, path = tempfile.mkstemp(dir=scratch_dir, prefix="video-", suffix=Path(uri).suffix)
    os.close(descriptor)
    try:
        _download(uri, path)
        yield path
    finally:
        Path(path).unlink()


def _check_readable(path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise _refusal(path, error) or TransientError(ErrorCode.NETWORK, f"{path} cannot be read: {error}.") from error


def _download(uri: str, path: str) -> None:
    for attempt in range(DOWNLOAD_TRIES):
        try:
            return _fetch(uri, path)
        except PipelineError:
            raise
        except Exception as error:  # every cloud library has exceptions of its own
            if refusal := _refusal(uri, error):
                raise refusal from error
            if attempt == DOWNLOAD_TRIES - 1:
                raise TransientError(
                    ErrorCode.NETWORK,
                    f"The file could not be fetched in {DOWNLOAD_TRIES} tries: {type(error).__name__}: {error}.",
                ) from error
            time.sleep(_BACKOFF_S * 2**attempt)
    return None


def _fetch(uri: str, path: str) -> None:
    fs, remote = locate(uri)
    size_bytes = fs.info(remote)["size"] or 0
    if size_bytes > min(MAX_OBJECT_BYTES, shutil.disk_usage(Path(path).parent).free):
        raise TerminalError(
            ErrorCode.TOO_LARGE, f"The file has {size_bytes / 1e9:.1f} GB, more than the scratch disk has room for."
        )
    fs.get_file(remote, path)


def _refusal(uri: str, error: Exception) -> TerminalError | None:
    """The failure that no retry will cure, if it is one."""
    if isinstance(error, FileNotFoundError):
        return TerminalError(ErrorCode.NOT_FOUND, f"There is no file at {uri} any more; list the source again.")
    if isinstance(error, PermissionError):
        return TerminalError(ErrorCode.FORBIDDEN, f"Reading {uri} is forbidden; check its permissions.")
    if isinstance(error, IsADirectoryError):
        return TerminalError(ErrorCode.NOT_A_VIDEO, f"{uri} is a folder, not a video.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return TerminalError(ErrorCode.TOO_LARGE, "The scratch disk is full; give it more room.")
    return None
