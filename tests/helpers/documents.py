"""What stands in the code blocks of a Markdown document."""

import re
from collections.abc import Iterator

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str = "") -> list[str]:
    """The code blocks of a language; those of no language by default."""
    return [content for name, content in _BLOCK.findall(text) if name == language]


def prose(text: str) -> str:
    """The text without its code blocks."""
    return _BLOCK.sub("", text)


def shell_commands(text: str) -> Iterator[str]:
    """The commands in a document's code blocks, lines that end in a backslash joined."""
    for block in blocks(text):
        yield from block.replace("\\\n", " ").splitlines()


def statements(block: str) -> list[str]:
    """The statements of a block of SQL, each with the comments before it."""
    return [statement.strip() for statement in block.split(";") if statement.strip()]
