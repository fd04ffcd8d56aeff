"""Listing a source of videos, page by page."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from longvlm.pipeline.refusals import code_of
from longvlm.pipeline.source.copies import bad_entry, facts
from longvlm.pipeline.source.fetch import ANSWER_S
from longvlm.pipeline.source.formats import HEAD_BYTES, VIDEO_EXTENSIONS, container_of
from longvlm.pipeline.source.leftovers import count_left_out, describe_left_out, leftover
from longvlm.pipeline.source.manifest import list_manifest
from longvlm.pipeline.source.pages import pages_below
from longvlm.pipeline.table_files import is_table
from longvlm.pipeline.uris import canonical_uri, locate, refusals_as_sentences
from longvlm.pipeline.visible import escaped_bytes, is_utf8
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from longvlm.schemas.identity import video_id
from longvlm.schemas.tables import LISTING

_SNIFFS_AT_ONCE = 256
_ROW_GROUP = 10_000  # rows of a listing that are held in memory


@dataclass(frozen=True)
class Source:
    """A source of videos: an fsspec prefix, one video, or a manifest (a file of rows with a column `uri`).

    `include` and `exclude` are fnmatch patterns on the path relative to the source (to the manifest's folder).
    """

    uri: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, relative_path: str) -> bool:
        """Whether the patterns let a path through."""
        included = not self.include or any(fnmatchcase(relative_path, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(relative_path, pattern) for pattern in self.exclude)

    @property
    def home(self) -> str:
        """The canonical URI of the source, as it stands in the column `source`."""
        return canonical_uri(*locate(self.uri))

    @property
    def is_manifest(self) -> bool:
        """Whether the source is a file that names videos."""
        return is_table(self.home)

    def coverage(self) -> Callable[[str], bool] | None:
        """The predicate whether a video at a canonical URI would be listed; None without patterns: then each would."""
        if not self.include and not self.exclude:
            return None
        home = self.home
        if self.is_manifest:
            home = home.rpartition("/")[0]
        prefix = home.rstrip("/") + "/"
        return lambda uri: self.takes(uri.removeprefix(prefix))


def list_source(source: Source) -> pa.Table:
    """List a source in memory: every video, as tables.LISTING, sorted by uri, each once.

    A folder is listed recursively: videos by extension, and files without any extension by their first bytes, but for
    leftovers. A file that is named itself is taken unless it is text.

    Raises:
        InputError: the source does not exist, is forbidden, holds no video, or is a manifest without `uri`.
    """
    left_out: Counter[str] = Counter()
    listing = pa.concat_tables([LISTING.empty_table(), *list_pages(source, left_out)])
    if not len(listing):
        raise nothing_in(source, left_out)
    return listing.sort_by("uri")


def spool_source(source: Source, path: str, left_out: Counter[str] | None = None) -> int:
    """List a source into a parquet file of tables.LISTING, in no order, and return how many videos there are.

    A bucket may hold millions: no more than a page of a listing and `_ROW_GROUP` of its rows are in memory at a time.

    Args:
        source: to list.
        path: of the file.
        left_out: counts what else lies in a folder, by kind.

    Raises:
        InputError: as `list_source`, but that nothing is there is for the caller to judge.
    """
    num_rows = 0
    held: list[pa.Table] = []
    with parquet.ParquetWriter(path, LISTING, compression="zstd") as writer:
        for page in list_pages(source, left_out):
            num_rows += len(page)
            held.append(page)
            if sum(map(len, held)) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(held))
                held.clear()
        if held:
            writer.write_table(pa.concat_tables(held))
    return num_rows


def list_pages(source: Source, left_out: Counter[str] | None = None) -> Iterator[pa.Table]:
    """List the videos of a source as tables.LISTING, page by page, in no order; `left_out`, InputError as above.

    An entry that cannot be one of a table is listed with the reason, under its name escaped.
    """
    fs, path = locate(source.uri)
    home = canonical_uri(fs, path)
    if not is_utf8(home):
        raise InputError(f"the address {escaped_bytes(home)} is not UTF-8, so it cannot be stored; rename the folder.")
    with refusals_as_sentences(source.uri, "listed"):
        for found in _list(fs, path, source, Counter() if left_out is None else left_out):
            rows = [{"video_id": video_id(uri), "source": home, "uri": uri, **known} for uri, known in found.items()]
            if rows:
                yield pa.Table.from_pylist(rows, schema=LISTING)


def nothing_in(source: Source, left_out: Counter[str]) -> InputError:
    """The error of a source without any video, but with what was left out."""
    others = f"; left out: {describe_left_out(left_out)}" if left_out else ""
    patterns = " that the include and exclude patterns let through" if source.include or source.exclude else ""
    return InputError(
        f"nothing to index: no video in {source.uri}{patterns}; looked for files ending in "
        f"{', '.join(sorted(VIDEO_EXTENSIONS))}, and into files without an extension{others}."
    )


def _list(fs: Any, path: str, source: Source, left_out: Counter[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """List each video with what is known of it, by canonical URI, a page at a time."""
    info = _describe(fs, path)
    is_file = fs.isfile(path) if info.get("islink") else info["type"] == "file"
    if not is_file:
        yield from _list_folder(fs, path, source, left_out)
    elif is_table(path):
        yield from list_manifest(fs, path, source.takes)
    else:
        # who names a file means it; it may be a raw stream, which no signature announces, but no text has zero bytes
        is_video = _has_video_extension(path) or b"\0" in _head(fs, path)
        if is_video and source.takes(PurePosixPath(path).name):
            yield dict([_entry(fs, path, info)])


def _describe(fs: Any, path: str) -> dict[str, Any]:
    """What a path is, as the filesystem says it."""
    try:
        info: dict[str, Any] = fs.info(path, timeout=ANSWER_S)
    except Exception as error:
        # S3 is asked by HEAD, and refuses that without a reason; a listing has one, or is what may be read here
        if "s3" not in fs.protocol or code_of(error) == ErrorCode.NOT_FOUND or not next(pages_below(fs, path), []):
            raise
        return {"type": "directory"}
    return info


def _list_folder(fs: Any, path: str, source: Source, left_out: Counter[str]) -> Iterator[dict[str, dict[str, Any]]]:
    prefix = path.rstrip("/") + "/"
    for page in pages_below(fs, path, lambda folder: leftover(folder.removeprefix(prefix)) is not None):
        files = {}
        for info in page:
            relative = info["name"].removeprefix(prefix)
            if not source.takes(relative):
                continue
            if kind := leftover(relative):
                count_left_out(left_out, relative, kind)
            else:
                files[info["name"]] = info
        unnamed = [name for name, info in files.items() if not PurePosixPath(name).suffix and info.get("size")]
        videos = {name for name in files if _has_video_extension(name)} | set(_sniff(fs, unnamed))
        for name in files.keys() - videos:
            count_left_out(left_out, name)
        yield dict(_entry(fs, name, files[name]) for name in videos)


def _entry(fs: Any, path: str, info: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The canonical URI of a listed file, and what is known of it: its facts, or why it cannot be watched."""
    uri = canonical_uri(fs, path)
    if not is_utf8(uri):
        return escaped_bytes(uri), bad_entry("The file's name is not UTF-8, so it cannot be stored; rename it.")
    try:
        return uri, facts(info)
    except TerminalError as error:
        return uri, bad_entry(error.message)


def _head(fs: Any, path: str) -> bytes:
    head: bytes = fs.cat_file(path, start=0, end=HEAD_BYTES, timeout=ANSWER_S)
    return head


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
