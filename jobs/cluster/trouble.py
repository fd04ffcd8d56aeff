"""What the machine lacks, as a sentence: a full or read-only disk, no files to open, no temporary folder, its bucket.

Libraries of several languages tell of it in exceptions of their own, so it is found by errno or by the system's words.
"""

import errno
import os
import re

_CURES = {
    errno.ENOSPC: "free some space on that disk, or use another (TMPDIR is for what is temporary)",
    errno.EDQUOT: "free some of your quota on that disk, or use another (TMPDIR is for what is temporary)",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`), or use another disk",
    errno.EROFS: "use a folder that can be written (TMPDIR is for what is temporary)",
    errno.EACCES: "check your rights there, or use another folder (TMPDIR is for what is temporary)",
    errno.EPERM: "check your rights there, or use another folder (TMPDIR is for what is temporary)",
    errno.EISDIR: "a folder is in the place of a file; move it away",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "close other programs: the whole machine has no more files to open",
    errno.EAGAIN: "raise the limit on processes (`ulimit -u`), or close other programs",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EIO: "look at that disk: it may be breaking",
    errno.ESTALE: "mount that network drive again",
    errno.ENOTCONN: "mount that network drive again",
}
_DAMAGED = re.compile(
    r"""["']([^"']+\.parquet)["']"""
)  # DuckDB's words; it reads no other files where it is not sealed
_UNANSWERED = re.compile(r"Error performing \w+ (\S+)")  # delta-rs's words; why comes last, in a tree or in XML
_NO_TEMPORARY_FOLDER = "No usable temporary directory"  # Python's words; each that it tried is full or read-only


def trouble(error: BaseException) -> str | None:
    """What the machine lacks and what to do about it, if that is behind an error or what caused it; else None."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if said := _told(cause):
            return said
        cause = cause.__cause__ or cause.__context__
    return None


def _told(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    if _NO_TEMPORARY_FOLDER in text:
        return "there is no folder for temporary files, or no room in it; set TMPDIR to one that can be written."
    if isinstance(error, OSError) and error.errno in _CURES and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}: {_CURES[error.errno]}."
    for code, cure in _CURES.items():
        if os.strerror(code) in text:
            path = re.search(r"""["'](/[^"']+)["']""", text)
            where = f" ({path[1]})" if path else ""
            return f"{os.strerror(code)}{where}: {cure}."
    return _told_of_a_store(error, text)


def _told_of_a_store(error: BaseException, text: str) -> str | None:
    """By the text and the names of classes, for the room of stores is not loaded for a sentence."""
    if asked := _UNANSWERED.search(text):
        why = re.findall(r"<Message>(.*?)\.?</Message>", text) or [text.rpartition("\u21b3")[2]]
        return f"{asked[1]} did not give what was asked for ({why[0].strip()}); check your rights and the network."
    if type(error).__name__ == "OutOfReachError":
        return f"{text}: check your rights and the network."
    file = _DAMAGED.search(text)
    is_of_a_page = (
        type(error).__name__ == "Error"
    )  # of no class of its own, and without the file: a page's damaged head
    if type(error).__module__ == "_duckdb" and (file or is_of_a_page):
        where = f" ({file[1]})" if file else ""
        return (
            f"a file of the store is damaged or gone{where}; `longvlm maintain --verify` says what it held, and "
            "`--repair` lets the next index run make it again where it can. What was begun goes on after that."
        )
    return None
