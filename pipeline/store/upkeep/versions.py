"""Old versions of a store's files, which a bucket may keep after the files themselves are deleted."""

import errno
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from longvlm.pipeline.store.files import filesystem
from longvlm.pipeline.uris import is_local

_AT_ONCE = 1000  # versions that S3 deletes in a request


def versioned(store_uri: str) -> str | None:
    """What a bucket keeps of the files that are deleted in it, in a sentence; None if that is nothing.

    Of S3 it is asked. Other stores have no common way of saying it, so it is told that they may.
    """
    if is_local(store_uri):
        return None
    fs, root = filesystem(store_uri)
    if "s3" not in fs.protocol:
        return "whether this bucket keeps deleted files (versions, soft deletion) cannot be seen from here; look there"
    try:
        answer = fs.call_s3("get_bucket_versioning", Bucket=root.partition("/")[0])
    except OSError as error:
        if error.errno == errno.ENOSYS:  # "NotImplemented": the server has no versions
            return None
        return f"whether the bucket keeps old versions cannot be seen ({error}); s3:GetBucketVersioning would say it"
    return "the bucket keeps old versions of deleted files" if answer.get("Status") else None


def delete_old_versions(store_uri: str, tables: Iterable[str]) -> tuple[int, list[str]]:
    """Delete what a bucket of S3's kept of the data files of some tables when they were deleted.

    Files of a table are never written twice, so whatever is not the newest version of a name belongs to no reader.

    Returns:
        How many versions were deleted, and what may be kept still, in sentences.
    """
    said = versioned(store_uri)
    if said is None:
        return 0, []
    fs, root = filesystem(store_uri)
    if "s3" not in fs.protocol:
        return 0, []  # not known, and told before
    bucket, _, prefix = root.partition("/")
    num_deleted, kept = 0, []
    for table in tables:
        try:
            old = _old_versions(fs, bucket, f"{prefix}/{table}/".lstrip("/"))
            while some := list(islice(old, _AT_ONCE)):
                answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": some, "Quiet": True})
                refused = answer.get("Errors", [])
                num_deleted += len(some) - len(refused)
                if refused:
                    kept.append(f"{len(refused)} old versions in {table} ({refused[0]['Code']})")
        except OSError as error:
            kept.append(f"{said}, and those in {table} cannot be deleted ({error})")
    return num_deleted, kept


def _old_versions(fs: Any, bucket: str, prefix: str) -> Iterator[dict[str, str]]:
    """Versions of data files that are not the newest, and the markers of deletion that hide them."""
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    while True:
        answer = fs.call_s3("list_object_versions", **request)
        old = [one for one in answer.get("Versions", []) if not one["IsLatest"]] + answer.get("DeleteMarkers", [])
        for one in old:
            if one["Key"].endswith(".parquet"):
                yield {"Key": one["Key"], "VersionId": one["VersionId"]}
        if not answer.get("IsTruncated"):
            return
        request |= {"KeyMarker": answer["NextKeyMarker"], "VersionIdMarker": answer["NextVersionIdMarker"]}
