"""Local copies of remote files, for as long as they are decoded, and what is known of files on any filesystem."""

import errno
import os
import random
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longvlm.pipeline.refusals import code_of, told_by
from longvlm.pipeline.source.fetch import ANSWER_S, FetchError, WholeNeededError, fetch
from longvlm.pipeline.source.scratch import WAIT_S, no_space, scratch_file
from longvlm.pipeline.uris import is_local, local_path, locate
from longvlm.schemas.errors import ErrorCode, PipelineError, TerminalError, TransientError

DOWNLOAD_TRIES = 3
_BACKOFF_S = 1.0  # doubled after each try
_PLAIN_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")


def facts(info: dict[str, Any]) -> dict[str, Any]:
    """Etag, size and modification time out of a filesystem's answer, whatever it calls them.

    Raises:
        TerminalError: BAD_ENTRY, for a time that no calendar has.
    """
    etag = info.get("ETag") or info.get("etag")
    if info.get("islink") and Path(info["name"]).exists():  # a change of the file, not of the link, counts
        info = {**info, "mtime": Path(info["name"]).stat().st_mtime}
    changed = next(
        (info[key] for key in ("LastModified", "last_modified", "updated", "mtime", "created") if info.get(key)), None
    )
    try:
        if isinstance(changed, str):
            changed = datetime.fromisoformat(changed)
        if isinstance(changed, int | float):
            changed = datetime.fromtimestamp(changed, UTC)
        if changed is not None and changed.tzinfo is not None:
            changed = changed.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError) as error:
        raise TerminalError(
            ErrorCode.BAD_ENTRY,
            f"The file is said to have changed at {changed}, which is no time that can be stored; touch it.",
        ) from error
    return {"etag": etag.strip('"') if etag else None, "size_bytes": info.get("size"), "modified_at": changed}


def bad_entry(message: str) -> dict[str, Any]:
    """What stands in place of the facts of an entry that cannot be used, as columns of tables.LISTING."""
    return {"error_code": ErrorCode.BAD_ENTRY.value, "error": message}


@contextmanager
def local_copy(
    uri: str, scratch_dir: str, size_bytes: int | None = None, fill: Callable[[str], None] | None = None
) -> Iterator[str]:
    """A local copy of a file, by its path: local files in place, others downloaded for as long as the context lasts.

    A copy lies right in the scratch folder under a name of our own, whatever the file's name is. It has as many bytes
    as were listed, where the listing told that (`size_bytes`). What fills it, by its path, may be given, else it is
    `download`.

    Raises:
        TerminalError: NOT_FOUND, FORBIDDEN, NOT_A_VIDEO, or TOO_LARGE for `fetch.MAX_OBJECT_BYTES` or the scratch disk.
        TransientError: NETWORK, after `DOWNLOAD_TRIES`; CREDENTIALS; NO_SPACE, see `scratch.await_room`.
    """
    if is_local(uri):
        path = local_path(uri)
        _check_readable(path)
        yield path
        return
    suffix = Path(uri).suffix
    with scratch_file(scratch_dir, suffix if _PLAIN_SUFFIX.fullmatch(suffix) else "") as path:
        if fill is None:
            download(uri, path, size_bytes)
        else:
            fill(path)
        yield path


def is_readable(uri: str) -> bool:
    """Whether the first byte of a remote file can be read now."""
    fs, path = locate(uri)
    try:
        fs.cat_file(path, start=0, end=1, timeout=ANSWER_S)
    except Exception:  # noqa: BLE001 - every cloud library has exceptions of its own
        return False
    return True


def _check_readable(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe waits for whoever writes to it
            raise TerminalError(ErrorCode.NOT_A_VIDEO, f"{path} is a pipe, socket or device, not a video.")
        with Path(path).open("rb"):
            pass
    except ValueError as error:  # a NUL in the name
        raise TerminalError(ErrorCode.NOT_FOUND, f"There can be no file named {path!r}.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise TerminalError(
                ErrorCode.NOT_FOUND, f"There is no file at {path}: it is a link that leads back to itself; remove it."
            ) from error
        if error.errno == errno.ENAMETOOLONG:
            raise TerminalError(
                ErrorCode.NOT_FOUND, f"There can be no file at {path}: its name is too long; check the address."
            ) from error
        raise _refusal(path, error) or TransientError(ErrorCode.NETWORK, f"{path} cannot be read: {error}.") from error


def check_unchanged(video: Mapping[str, Any]) -> None:
    """Check that a file is still the one that was listed, as far as that can be told: by etag, else by size and time.

    Args:
        video: uri, etag, size_bytes and modified_at of it, as columns of tables.LISTING.

    Raises:
        TransientError: NETWORK, it is another one; or as `local_copy`.
    """
    now: dict[str, Any] = {}

    def look() -> None:
        fs, path = locate(video["uri"])
        fs.invalidate_cache(path)
        now.update(facts(fs.info(path)))

    persist(video["uri"], look)
    names = ("etag",) if video.get("etag") and now["etag"] else ("size_bytes", "modified_at")
    if any(None not in (video.get(name), now[name]) and video[name] != now[name] for name in names):
        raise TransientError(
            ErrorCode.NETWORK,
            "The file was replaced while several decoders were at it; the next run takes the new one.",
        )


def is_as_listed(video: Mapping[str, Any]) -> bool:
    """Whether a file is there and can be told to be the one that was listed; arguments as `check_unchanged`."""
    try:
        check_unchanged(video)
    except PipelineError:
        return False
    return True


def download(uri: str, path: str, size_bytes: int | None) -> None:
    """Download a remote file over one that is there. Raises as `local_copy`."""

    def give_back() -> int:
        num_bytes = Path(path).stat().st_size
        os.truncate(path, 0)
        return num_bytes

    persist(uri, lambda: fetch(uri, path, size_bytes), give_back)


def persist(uri: str, read: Callable[[], None], give_back: Callable[[], int] = lambda: 0) -> None:
    """Read of a remote file, again where that may help. Raises as `local_copy`, and WholeNeededError.

    Args:
        uri: of the file.
        read: one try, which may raise whatever its filesystem does.
        give_back: empties what was written of it where the disk is full, and says how many bytes that were.
    """
    failures = 0
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return read()
        except (PipelineError, WholeNeededError):
            raise
        except Exception as error:  # every cloud library has exceptions of its own
            if refusal := _refusal(uri, error):
                raise refusal from error
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # another decoder was quicker
                num_bytes = give_back()
                if time.monotonic() > deadline:
                    raise no_space(num_bytes) from error
            else:
                failures += 1
                if failures == DOWNLOAD_TRIES:
                    told = str(error) if isinstance(error, FetchError) else told_by(error)
                    raise TransientError(
                        ErrorCode.NETWORK, f"The file could not be fetched in {DOWNLOAD_TRIES} tries: {told}."
                    ) from error
            time.sleep(_BACKOFF_S * 2**failures * random.uniform(0.5, 1))  # noqa: S311 - so that two do not collide again


def _refusal(uri: str, error: Exception) -> PipelineError | None:
    """The failure that no second try will cure, if it is one."""
    code = code_of(error)
    if code == ErrorCode.NOT_FOUND:
        return TerminalError(code, f"There is no file at {uri} any more; list the source again.")
    if code == ErrorCode.FORBIDDEN:
        why = "" if is_local(uri) else f" ({told_by(error)})"
        return TerminalError(code, f"Reading {uri} is forbidden{why}; check its permissions.")
    if code == ErrorCode.NOT_A_VIDEO:
        return TerminalError(code, f"{uri} is a folder, not a video.")
    if code == ErrorCode.CREDENTIALS:
        return TransientError(
            code, f"The run and not this video is refused ({told_by(error)}); renew its keys, or set its clock."
        )
    return None
