"""Manifests: files of rows (CSV, JSON, JSONL or parquet) that name videos, with what the user knows of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from longvlm.pipeline.source.copies import bad_entry, facts
from longvlm.pipeline.source.fetch import ANSWER_S
from longvlm.pipeline.table_files import NOT_UTF8, Column, read_batches
from longvlm.pipeline.text_files import UserFile
from longvlm.pipeline.uris import AddressError, canonical_uri, is_local, local_path, locate, without_secrets
from longvlm.schemas.errors import InputError, TerminalError

_ROWS_AT_ONCE = 1000
_LOOKUPS_AT_ONCE = 32  # requests in flight for the details of entries
_COLUMNS = {
    "uri": Column(("uri",), "text", required=True),
    "external_id": Column(("external_id",)),
    "etag": Column(("etag",)),
    "size": Column(("size",), "count"),
}


def list_manifest(fs: Any, path: str, takes: Callable[[str], bool]) -> Iterator[dict[str, dict[str, Any]]]:
    """List the videos of a manifest with what is known of each, by canonical URI, some hundreds of its rows at a time.

    Relative URIs count from the manifest's folder, and so do the paths that `takes` judges. Where neither etag nor
    size is given they are asked for; a file that is not there is listed all the same, to fail with its reason. So is an
    address that cannot be used, with the number of its row: one with a NUL, not in UTF-8, of a protocol that nothing
    speaks, with a secret in it, or of a local file in a manifest that is not local: who may write to a bucket may not
    have this machine's files read.

    Raises:
        InputError: the manifest cannot be read; no column `uri`, a row without one, a size that is none, or one video
            under two external ids.
    """
    name, folder = canonical_uri(fs, path), path.rpartition("/")[0]
    file = UserFile(name, "manifest", is_judged_by_row=True)
    home = canonical_uri(fs, folder).rstrip("/") + "/"
    external_ids: dict[str, str | None] = {}
    entries = enumerate(entry for batch in read_batches(file, _COLUMNS) for entry in batch.to_pylist())
    while some := list(islice(entries, _ROWS_AT_ONCE)):
        found: dict[str, dict[str, Any]] = {}
        rows: dict[str, str] = {}
        for place, entry in some:
            if not entry["uri"]:
                raise InputError(f"{file.row(place)} has no uri; fill it in or remove the row.")
            uri, known = _judged(fs, folder, entry)
            if not takes(uri.removeprefix(home)):
                continue
            external_id = known["external_id"]
            if external_ids.get(uri, external_id) != external_id:
                raise InputError(f"{file} names {uri} twice, as {external_ids[uri]} and as {external_id}; keep one.")
            if uri not in external_ids:
                external_ids[uri] = external_id
                found[uri] = known
                rows[uri] = file.row(place)
        _complete(found)
        for uri in [uri for uri, known in found.items() if "error" in known]:
            found[uri]["error"] = f"In {rows[uri]}: {found[uri]['error']}"
        yield found


def _complete(found: dict[str, dict[str, Any]]) -> None:
    """Ask for the details of videos of which a manifest gives none."""
    unknown = [
        uri
        for uri, known in found.items()
        if known["etag"] is None and known["size_bytes"] is None and "error_code" not in known
    ]
    with ThreadPoolExecutor(_LOOKUPS_AT_ONCE) as pool:
        for uri, looked_up in zip(unknown, pool.map(_look_up, unknown), strict=True):
            found[uri] |= looked_up


def _judged(fs: Any, folder: str, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An entry's canonical address and what is known of it; of one that cannot be used what may be told, and why."""
    readable = {
        name: value.removesuffix(NOT_UTF8) if isinstance(value, str) else value for name, value in entry.items()
    }
    known = {"external_id": readable["external_id"], "etag": readable["etag"], "size_bytes": readable["size"]}
    uri = readable["uri"]
    for name in (name for name, value in readable.items() if value != entry[name]):
        reason = f"its {name} is not UTF-8 text; save the manifest as UTF-8, or rename the file."
        return without_secrets(uri), known | bad_entry(reason)
    try:
        return _resolve(fs, folder, uri), known
    except AddressError as error:
        return without_secrets(uri).replace("\0", "\\x00"), known | bad_entry(str(error))


def _resolve(fs: Any, folder: str, uri: str) -> str:
    """The canonical form of an entry; AddressError where it cannot be used."""
    if "\0" in uri:
        raise AddressError("its address has a NUL in it, which no name can have; correct it.")
    if not is_local(uri):
        return canonical_uri(*locate(uri))
    is_here = is_local(canonical_uri(fs, folder))
    if uri.startswith(("file://", "/")):
        if not is_here:
            raise AddressError(
                "it names a file of the machine that reads it; a manifest in a bucket may name files in buckets only: "
                "remove the row, or copy the manifest here."
            )
        return local_path(uri)
    path = f"{folder}/{uri}"
    return local_path(path) if is_here else canonical_uri(fs, path)


def _look_up(uri: str) -> dict[str, Any]:
    """Etag, size and time of a file; nothing where they cannot be had, which will show when it is watched."""
    fs, path = locate(uri)
    try:
        info = fs.info(path, timeout=ANSWER_S)
    except Exception:  # noqa: BLE001 - every cloud library has exceptions of its own
        return {}
    try:
        return facts(info)
    except TerminalError as error:
        return bad_entry(error.message)
