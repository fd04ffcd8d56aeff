"""One try to fetch a remote file: bounded by its progress, and held against what the listing told of it."""

import asyncio
from pathlib import Path
from typing import Any

from longvlm.pipeline.source.formats import container_of, read_head
from longvlm.pipeline.source.scratch import await_room
from longvlm.pipeline.uris import locate
from longvlm.schemas.errors import ErrorCode, TerminalError

MAX_OBJECT_BYTES = 64 << 30  # a download that is larger is not a video to watch, or not on this machine
# In each such time so many bytes have to come, or the whole file. That is 4 kB/s: slower than any line that carries
# videos, and a server that never ends its answer is left after a minute.
PROGRESS_S, PROGRESS_BYTES = 60.0, 256 << 10
ANSWER_S = 30.0  # for what is asked of a file besides its content
_PAGE_BEGINS = (b"<", b"{", b"[")  # HTML, XML and JSON; no container begins so
_SHOWN_CHARS = 60


class FetchError(Exception):
    """What came of a try that may be repeated, in a clause for the user."""


class WholeNeededError(Exception):
    """The whole object is needed and not some ranges of it, for a reason that is counted: a word or two."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def fetch(uri: str, path: str, size_bytes: int | None) -> None:
    """Fetch a remote file.

    Args:
        uri: what to fetch.
        path: of a local file that is there, and is overwritten.
        size_bytes: as it was listed; None, or 0 as some web servers answer, where the listing did not tell it.

    Raises:
        TerminalError: TOO_LARGE; NOT_A_VIDEO for a web page in place of the video.
        TransientError: NO_SPACE, see `scratch.await_room`.
        FetchError: less or more came than was listed, or so slowly that it was given up.

    And what the filesystem raises, see `refusals.code_of`.
    """
    fs, remote = locate(uri)
    expected = size_bytes or _ask_for_size(fs, remote)
    _check_size(expected or 0)
    await_room(expected or 0, str(Path(path).parent))
    _transfer(fs, remote, path)
    _refuse_page(path)
    received = Path(path).stat().st_size
    if expected and received != expected:
        raise FetchError(f"{received} bytes came where {expected} were listed; list it again if it was replaced since")


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_OBJECT_BYTES:
        raise TerminalError(
            ErrorCode.TOO_LARGE, f"The file has {num_bytes / 1e9:.1f} GB, more than {MAX_OBJECT_BYTES / 1e9:.1f}."
        )


def _ask_for_size(fs: Any, remote: str) -> int | None:
    try:
        size: int | None = fs.info(remote, timeout=ANSWER_S)["size"]
    except Exception:  # noqa: BLE001 - reading it comes next and fails with a reason, which an answer to HEAD lacks
        return None
    return size


def _transfer(fs: Any, remote: str, path: str) -> None:
    from fsspec.asyn import sync
    from fsspec.callbacks import Callback

    # a server need not tell the size, nor keep to it
    received = Callback(hooks={"size": lambda size, value: _check_size(max(size or 0, value))})
    if not fs.async_impl:
        fs.get_file(remote, path, callback=received)
        return
    sync(fs.loop, _while_it_comes, fs._get_file(remote, path, callback=received, **_options(fs)), received)  # noqa: SLF001


def _options(fs: Any) -> dict[str, Any]:
    """What lets a filesystem read a file in one stream for as long as it takes."""
    if "http" in fs.protocol:
        from aiohttp import ClientTimeout

        return {"timeout": ClientTimeout(total=None)}  # else five minutes
    # of ten streams s3fs tells nothing before 500 MB have come, and takes a range that ends too early for a whole one
    return {"max_concurrency": 1} if "s3" in fs.protocol else {}


async def _while_it_comes(transfer: Any, received: Any) -> None:
    """Run a transfer to its end, or give it up when too little has come in `PROGRESS_S`."""
    task = asyncio.ensure_future(transfer)
    while True:
        before = received.value
        await asyncio.wait({task}, timeout=PROGRESS_S)
        if task.done():
            return await task
        if received.value - before < PROGRESS_BYTES:
            task.cancel()
            await asyncio.wait({task})
            raise FetchError(f"in {PROGRESS_S:g} s no more than {received.value - before} bytes came")


def _refuse_page(path: str) -> None:
    """Raise TerminalError for a page that a server sends, with status 200, to whoever is not logged in."""
    head = read_head(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(_PAGE_BEGINS) and b"\0" not in head and container_of(head) is None:
        shown = " ".join(text.decode("utf-8", "replace").split())[:_SHOWN_CHARS]
        raise TerminalError(
            ErrorCode.NOT_A_VIDEO,
            f"The server sent a page in place of a video, such as one to log in (it begins {shown!r}); check the "
            "address and the rights, then retry not_a_video.",
        )
