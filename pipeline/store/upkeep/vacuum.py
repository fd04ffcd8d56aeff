"""What lies in a store and belongs to nobody any more: replaced files, shards of dead runs, uploads cut off."""

import contextlib
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from longvlm.pipeline.store import delta
from longvlm.pipeline.store.files import files_on_disk, filesystem, remove_files
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.taken import strike_old
from longvlm.pipeline.uris import is_local
from longvlm.schemas import clock
from longvlm.schemas.tables import TABLES


def vacuum(store: Store, retention_hours: float) -> dict[str, int]:
    """Delete files that the log dropped, and files it never named, longer ago than the retention.

    Shards that a run under way has written and not committed yet are files the log does not name. The log says first
    that they are taken, so that a run which slept for longer finds out (`Store.taking`).

    Returns:
        files, bytes: deleted of the tables; uploads: multipart uploads that were cut off, given up (S3 only, other
        stores let them expire); drafts: leftovers of `index.duckdb` and of samples (local only).
    """
    swept = {"files": 0, "bytes": 0}

    def delete(table: str, files: dict[str, int]) -> None:
        removed = remove_files(f"{store.uri}/{table}", files)
        swept["files"] += len(removed)
        swept["bytes"] += sum(files[path] for path in removed)

    for table in filter(store.has, TABLES):
        delete(table, unreferenced(store, table, retention_hours, full=False))
        if unreferenced(store, table, retention_hours):
            with store.taking(table, partial(_never_named, store, table, retention_hours)) as never_named:
                delete(table, never_named)
        strike_old(store.uri, table, retention_hours)
        _remove_log_drafts(store.uri, table, retention_hours)
        store.handle(table).cleanup_metadata()  # versions of the log that are older than a month
    uploads = _abort_uploads(store.uri, retention_hours)
    return {**swept, "uploads": uploads, "drafts": _remove_drafts(store.uri, retention_hours)}


def _never_named(store: Store, table: str, retention_hours: float, _: DeltaTable) -> dict[str, int]:
    return unreferenced(store, table, retention_hours)


def unreferenced(store: Store, table: str, retention_hours: float, *, full: bool = True) -> dict[str, int]:
    """Files of a table that are on the disk, and not in the log since longer than the retention, with their bytes.

    Delta says which these are. It is not asked to delete them, because it notes that in the log, every time, for as
    long as the log remembers that they were dropped.

    Args:
        store: opened by this process.
        table: its name.
        retention_hours: how long ago they were dropped, or, if they were never named, written.
        full: also those that the log never named.
    """
    hours = int(retention_hours)
    stale = delta.stale_files(f"{store.uri}/{table}", store.handle(table), hours, full=full)
    if not stale:
        return {}
    on_disk = files_on_disk(f"{store.uri}/{table}")
    return {path: on_disk[path] for path in stale if path in on_disk}


def _remove_log_drafts(store_uri: str, table: str, retention_hours: float) -> None:
    """Entries of a local log whose writer was killed before it could give them their names."""
    if not is_local(store_uri):
        return
    before_s = clock.now_s() - retention_hours * 3600
    for path in Path(store_uri, table, "_delta_log").glob("*.tmp*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before_s:
                path.unlink()


def _remove_drafts(store_uri: str, retention_hours: float) -> int:
    """Drafts of `index.duckdb`, and samples' stores, whose writer was killed before it could rename or remove them."""
    if not is_local(store_uri):
        return 0
    before_s = clock.now_s() - retention_hours * 3600
    left = [path for kind in (".index-*", ".sample-*") for path in Path(store_uri).glob(kind)]
    stale = [path for path in left if path.stat().st_mtime < before_s]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return len(stale)


def _abort_uploads(store_uri: str, retention_hours: float) -> int:
    fs, root = filesystem(store_uri)
    if "s3" not in fs.protocol:
        return 0
    bucket, _, prefix = root.partition("/")
    before = datetime.fromtimestamp(clock.now_s(), UTC) - timedelta(hours=retention_hours)
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    num_aborted = 0
    while True:
        answer = fs.call_s3("list_multipart_uploads", **request)
        for upload in answer.get("Uploads", []):
            if upload["Initiated"] < before:
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                num_aborted += 1
        if not answer.get("IsTruncated"):
            return num_aborted
        request |= {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
