"""Text as people may see it: what a terminal would obey, or nobody could see, is written out."""

from unicodedata import category

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible ones, halves of characters, separators of lines


def visible(text: str, keep: str = "") -> str:
    r"""The text with what is hidden in it escaped: `\x1b`, `\t`, `\u200b`, and `\xe9` for a byte that is no UTF-8.

    Names of files, ids and messages may hold anything, and a terminal would obey some of it.

    Args:
        text: of whatever origin.
        keep: characters that stay as they are, such as line breaks where lines are the text's own.
    """
    if text.isprintable() and text.isascii():
        return text
    return "".join(char if char in keep or category(char) not in _HIDDEN else _escaped(char) for char in text)


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: a name of a file that is no UTF-8 has halves of characters for the bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped_bytes(name: str) -> str:
    r"""A name with the bytes in it that are no UTF-8 as `\xe9`, and all else as it is."""
    return "".join(char if is_utf8(char) else _escaped(char) for char in name)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # as Python reads a name that is no UTF-8 (PEP 383)
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
