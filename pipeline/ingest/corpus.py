"""A source of videos -> its listing, and what of it has to be done, given what a store already holds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.ingest.formats import HEAD_BYTES, VIDEO_EXTENSIONS, container_of
from pipeline.ingest.manifest import MANIFEST_SUFFIXES, list_manifest
from pipeline.ingest.objects import canonical_uri, facts, is_local, locate
from schemas.errors import InputError
from schemas.identity import video_id
from schemas.tables import LISTING, VIDEOS

T = TypeVar("T")
_SNIFFS_AT_ONCE = 256


@dataclass(frozen=True)
class Source:
    """Where the videos are: an fsspec prefix, one video, or a manifest (.parquet or .csv with a column `uri`).

    `include` and `exclude` are fnmatch patterns on the path relative to the source (to the manifest's folder).
    """

    uri: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, relative_path: str) -> bool:
        """Whether the patterns let a path through."""
        included = not self.include or any(fnmatchcase(relative_path, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(relative_path, pattern) for pattern in self.exclude)


def list_source(source: Source) -> pa.Table:
    """Every video of a source, as tables.LISTING, sorted by uri, each once.

    A folder is listed recursively: videos by extension, and files without any extension by their first bytes.

    Raises:
        InputError: the source does not exist, is forbidden, holds no video, or is a manifest without `uri`.
    """
    fs, path = locate(source.uri)
    found = _asking(source.uri, lambda: _list(fs, path, source))
    if not found:
        patterns = " that the include and exclude patterns let through" if source.include or source.exclude else ""
        raise InputError(
            f"nothing to index: no video in {source.uri}{patterns}; looked for files ending in "
            f"{', '.join(sorted(VIDEO_EXTENSIONS))}, and into files without an extension."
        )
    home = canonical_uri(fs, path)
    rows = [{"video_id": video_id(uri), "source": home, "uri": uri, **found[uri]} for uri in sorted(found)]
    return pa.Table.from_pylist(rows, schema=LISTING)


def _asking(uri: str, request: Callable[[], T]) -> T:
    """The answer of a filesystem, its refusals turned into sentences."""
    try:
        return request()
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{uri} does not exist; check the address.") from error
    except PermissionError as error:
        raise InputError(
            f"access to {uri} is forbidden ({error}); check its permissions or your credentials."
        ) from error
    except Exception as error:  # every cloud library has exceptions of its own
        raise InputError(
            f"{uri} cannot be listed: {type(error).__name__}: {error}; check the address, the network and your "
            "credentials."
        ) from error


def _list(fs: Any, path: str, source: Source) -> dict[str, dict[str, Any]]:
    """What is known of each video, by canonical URI."""
    info = fs.info(path)
    is_file = fs.isfile(path) if info.get("islink") else info["type"] == "file"
    if not is_file:
        return _list_folder(fs, path, source)
    if PurePosixPath(path).suffix.lower() in MANIFEST_SUFFIXES:
        return list_manifest(fs, path, source.takes)
    is_video = _has_video_extension(path) or container_of(fs.cat_file(path, start=0, end=HEAD_BYTES)) is not None
    return {canonical_uri(fs, path): facts(info)} if is_video and source.takes(PurePosixPath(path).name) else {}


def _list_folder(fs: Any, path: str, source: Source) -> dict[str, dict[str, Any]]:
    below = _walk(fs, path) if is_local(source.uri) else fs.find(path, detail=True)
    prefix = path.rstrip("/") + "/"
    files = {name: info for name, info in below.items() if source.takes(name.removeprefix(prefix))}
    unnamed = [name for name, info in files.items() if not PurePosixPath(name).suffix and info.get("size")]
    videos = {name for name in files if _has_video_extension(name)} | set(_sniff(fs, unnamed))
    return {canonical_uri(fs, name): facts(files[name]) for name in videos}


def _walk(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """As fs.find, but a folder that may not be read is an error: fsspec's own passes over it in silence."""
    files, folders = {}, [path]
    while folders:
        for info in fs.ls(folders.pop(), detail=True):
            if info["type"] == "directory":
                folders.append(info["name"])
            else:
                files[info["name"]] = info
    return files


def _has_video_extension(path: str) -> bool:
    return PurePosixPath(path).suffix.lower().removeprefix(".") in VIDEO_EXTENSIONS


def _sniff(fs: Any, paths: list[str]) -> Iterable[str]:
    """Those that begin like a video; one that may not be read is taken along, to fail with its reason."""
    for start in range(0, len(paths), _SNIFFS_AT_ONCE):
        some = paths[start : start + _SNIFFS_AT_ONCE]
        heads = fs.cat_ranges(some, [0] * len(some), [HEAD_BYTES] * len(some), on_error="return")
        for path, head in zip(some, heads, strict=True):
            if isinstance(head, Exception) or container_of(bytes(head)) is not None:
                yield path


# --- what is new ---


@dataclass(frozen=True)
class Diff:
    """A listing held against a store: what to do, and how much of the rest there is."""

    work: pa.Table  # LISTING, and `attempts` so far at this same content
    num_unchanged: int
    num_known_failed: int
    num_stale: int


def diff(
    listing: pa.Table, newest: pa.Table, recipe: str, *, retry_failed: bool = False, restale: bool = False
) -> Diff:
    """What of a listing a recipe still has to be run on.

    Args:
        listing: tables.LISTING.
        newest: the newest row of any status per (video_id, recipe): video_id, recipe, status, etag, size_bytes,
            modified_at, attempts.
        recipe: the fingerprint.
        retry_failed: try again what failed at this same content.
        restale: index also what is indexed at this same content under other recipes only.
    """
    mine, elsewhere = _known(newest, recipe)
    work: list[int] = []
    attempts_so_far: list[int] = []
    num_unchanged = num_known_failed = num_stale = 0
    listed = zip(
        *(listing[name].to_pylist() for name in ("video_id", "etag", "size_bytes", "modified_at")), strict=True
    )
    for index, (video, etag, size, modified) in enumerate(listed):
        content = _content(etag, size, modified)
        status, known, attempts = mine.get(video, ("", None, 0))
        same = status in ("indexed", "failed") and known == content
        if same and status == "indexed":
            num_unchanged += 1
        elif same and not retry_failed:
            num_known_failed += 1
        elif not status and (video, content) in elsewhere and not restale:
            num_stale += 1
        else:
            work.append(index)
            attempts_so_far.append(attempts if same else 0)
    table = listing.take(pa.array(work, pa.int64()))
    attempts_column = pa.array(attempts_so_far, VIDEOS.field("attempts").type)
    return Diff(table.append_column("attempts", attempts_column), num_unchanged, num_known_failed, num_stale)


def _content(etag: str | None, size_bytes: int | None, modified_at: datetime | None) -> tuple[Any, ...]:
    """What tells one content of a file from another: its etag and size; its time of change only without an etag."""
    return (etag, size_bytes) if etag else (size_bytes, modified_at)


def _known(newest: pa.Table, recipe: str) -> tuple[dict[str, tuple[str, Any, int]], set[tuple[str, Any]]]:
    """By video: status, content and attempts under a recipe; and (video, content) indexed under any other."""
    mine: dict[str, tuple[str, Any, int]] = {}
    elsewhere: set[tuple[str, Any]] = set()
    columns = ("video_id", "recipe", "status", "attempts", "etag", "size_bytes", "modified_at")
    for video, of_recipe, status, attempts, *content in zip(*(newest[n].to_pylist() for n in columns), strict=True):
        if of_recipe == recipe:
            mine[video] = (status, _content(*content), attempts or 0)
        elif status == "indexed":
            elsewhere.add((video, _content(*content)))
    return mine, elsewhere
