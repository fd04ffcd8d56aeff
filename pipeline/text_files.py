"""Files that a user names, wherever they lie, and their lines of text in whichever Unicode encoding."""

import io
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from longvlm.pipeline.uris import locate, refusals_as_sentences, refuse_secrets
from longvlm.schemas.errors import InputError

_NO_TEXT = {  # by their first bytes
    BOM_UTF32_LE: "UTF-32",
    BOM_UTF32_BE: "UTF-32",
    b"\x1f\x8b": "compressed by gzip",
    b"PK\x03\x04": "a zip archive, as spreadsheets' own files are",
    b"PAR1": "parquet",
}


@dataclass(frozen=True)
class UserFile:
    """A file that a user names: a path or any address of fsspec's, and what sentences call such a file."""

    address: str
    kind: str  # a noun: "question file", "manifest"
    is_judged_by_row: bool = False  # a row with a NUL, or with what is not UTF-8, does not speak for the others

    def __post_init__(self) -> None:
        """Refuse an address with a secret, which sentences would tell."""
        refuse_secrets(self.address)

    def __str__(self) -> str:
        """The file as sentences name it."""
        return f"the {self.kind} {self.address}"

    def row(self, place: int) -> str:
        """A row of it as sentences name it: at place 0 is row 1."""
        return f"row {place + 1} of {self}"


@contextmanager
def open_file(file: UserFile) -> Iterator[Any]:
    """A file's bytes; InputError if it is not there, a folder, forbidden or out of reach."""
    with refusals_as_sentences(str(file)):
        fs, path = locate(file.address)
        if fs.info(path)["type"] == "directory":  # an object store opens what is only the beginning of other names
            raise IsADirectoryError(path)
        opened = fs.open(path, "rb")
    with opened:
        yield opened


def read_lines(file: UserFile, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, a few kB of it in memory at a time: UTF-8, or UTF-16 if it begins with its mark.

    Args:
        file: which.
        newline: as of `open`: None makes every kind of line break one, "" leaves them as they are.

    In a file judged by row, what is not UTF-8 comes as half surrogate pairs.

    Raises:
        InputError: the file cannot be opened or read, or is neither; it says what was found instead.
    """
    with open_file(file) as opened, refusals_as_sentences(str(file)):
        head = opened.read(4)
        opened.seek(0)
        if found := next((what for mark, what in _NO_TEXT.items() if head.startswith(mark)), None):
            raise InputError(f"{file} is {found}, and not UTF-8 text; save it as UTF-8.")
        is_utf16 = head.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
        number = 0
        try:
            for number, line in enumerate(io.TextIOWrapper(opened, encoding, errors, newline), start=1):
                if file.is_judged_by_row:
                    # binary files and UTF-16 without its mark have zero bytes from the first line on
                    is_suspect = number == 1 and "\0" in line
                else:
                    is_suspect = "\0" in line or not line.isascii()
                if is_suspect:
                    _check(file, number, line)
                yield line
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file} begins as UTF-16 and is broken after line {number} ({error.reason}); save it as UTF-8."
            ) from error


def _check(file: UserFile, number: int, line: str) -> None:
    """Raise InputError for a line with what no UTF-8 text has."""
    where = f"line {number} of {file} is not UTF-8 text"
    if "\0" in line:
        raise InputError(
            f"{where}: it has a zero byte, as UTF-16 without a mark and binary files do; save it as UTF-8."
        )
    try:
        line.encode()
    except UnicodeEncodeError as error:  # what could not be decoded stands in the line as half a surrogate pair
        byte = (ord(line[error.start]) - 0xDC00).to_bytes()
        meant = byte.decode("cp1252", "replace")
        raise InputError(
            f"{where}: it has the byte 0x{byte.hex().upper()}, which Windows-1252 (Latin-1) has for {meant!r}; save it "
            "as UTF-8."
        ) from error
