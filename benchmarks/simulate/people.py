"""The bucket that videos lie in, and what people do to it between two looks."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from longvlm.schemas.identity import video_id

_NAMES = 12  # that people give to videos; contents never come twice
_BAD_EVERY = 9  # content that nothing can decode


@dataclass
class Footage:
    """A folder of files, each of which holds the number of its content.

    Contents differ in size, so that a renamed file is known by it.
    """

    folder: Path
    there: dict[str, int] = field(default_factory=dict)  # name -> content
    since: dict[str, int] = field(default_factory=dict)  # name -> step since which it is there so
    content_since: dict[int, int] = field(default_factory=dict)  # content -> step since which some name has it
    trash: dict[str, int] = field(default_factory=dict)  # what was removed last, by name
    num_contents: int = 0
    step: int = 0

    def act(self, what: str, number: int) -> str | None:
        """What people do; None if there is nothing to do it to. Returns what was done, in words."""
        free = [name for name in map(_name, range(_NAMES)) if name not in self.there]
        gone = sorted(set(self.trash) - set(self.there))
        names = {"add": free, "restore": gone}.get(what, sorted(self.there))
        if not names or (what == "rename" and not free):
            return None
        name = names[number % len(names)]
        match what:
            case "add" | "overwrite":
                self._put(name, self._new())
            case "restore":
                self._put(name, self.trash.pop(name))
            case "remove":
                self.trash[name] = self._take(name)
            case "rename":
                name = f"{name} to {self._put(free[number // 16 % len(free)], self._take(name))}"
        return f"{what} {name}"

    def path(self, name: str) -> str:
        """Where a file is or would be."""
        return str(self.folder / name)

    def names(self) -> dict[str, str]:
        """Video id -> name, of all that could ever be there."""
        return {video_id(self.path(name)): name for name in map(_name, range(_NAMES))}

    def _new(self) -> int:
        self.num_contents += 1
        return self.num_contents

    def _put(self, name: str, content: int) -> str:
        before = self.there.get(name)
        self.there[name], self.since[name] = content, self.step
        self.content_since.setdefault(content, self.step)
        if before is not None and before not in self.there.values():
            self.content_since.pop(before, None)
        path = self.folder / name
        path.write_bytes(written(content))
        os.utime(path, (1_000_000_000 + content,) * 2)
        return name

    def _take(self, name: str) -> int:
        content = self.there.pop(name)
        del self.since[name]
        (self.folder / name).unlink()
        return content

    def settle(self) -> None:
        """Forget contents that no name has any more; a renamed one was never away."""
        there = {*self.there.values()}
        self.content_since = {content: step for content, step in self.content_since.items() if content in there}


def written(content: int) -> bytes:
    """The bytes of a file: the number of its content, and as many dots as tell it from others by its size."""
    return f"{content:06}".encode() + b"." * content


def content_of_size(size_bytes: int) -> int:
    """The content that has so many bytes."""
    return size_bytes - 6


def is_bad(content: int) -> bool:
    """Whether a content cannot be decoded."""
    return content % _BAD_EVERY == 0


def num_units(content: int) -> int:
    """Into how many units a content is decoded."""
    return 1 + content % 2


def num_segments(content: int) -> int:
    """How many segments a content has."""
    return num_units(content) * 2


def marker(content: int) -> bytes:
    """The 32 bytes that each token of a content is, sixteen float16."""
    return 2 * f"<content {content:06}>".encode()


def _name(number: int) -> str:
    return f"clip-{number:02}.mp4"
