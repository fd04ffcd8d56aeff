"""Paged listing of the files below a folder of any filesystem: a bucket may hold more than memory does."""

from collections.abc import Iterator
from typing import Any


def pages_below(fs: Any, path: str) -> Iterator[list[dict[str, Any]]]:
    """List every file below a folder, as the filesystem describes it, page by page and in no order.

    From S3 a page is one answer of the service (1000 keys). Elsewhere it is a folder, which fsspec can list only whole.
    Nothing is kept in fsspec's own cache of listings.

    Raises what the filesystem raises; a folder that may not be read is an error, and not passed over.
    """
    yield from _s3_pages(fs, path) if "s3" in fs.protocol else _folders(fs, path)


def _s3_pages(fs: Any, path: str) -> Iterator[list[dict[str, Any]]]:
    bucket, _, prefix = path.strip("/").partition("/")
    request = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", **fs.req_kw}
    while True:
        answer = fs.call_s3("list_objects_v2", **request)
        keys = answer.get("Contents", [])
        # a key that ends in a slash stands for a folder
        yield [_described(bucket, entry) for entry in keys if not entry["Key"].endswith("/")]
        if not answer.get("IsTruncated"):
            return
        request["ContinuationToken"] = answer["NextContinuationToken"]


def _described(bucket: str, entry: dict[str, Any]) -> dict[str, Any]:
    return {**entry, "name": f"{bucket}/{entry['Key']}", "size": entry["Size"], "type": "file"}


def _folders(fs: Any, path: str) -> Iterator[list[dict[str, Any]]]:
    folders = [path]
    while folders:
        folder = folders.pop()
        entries = fs.ls(folder, detail=True)
        fs.invalidate_cache(folder)
        folders += [info["name"] for info in entries if info["type"] == "directory" and info["name"] != folder]
        yield [info for info in entries if info["type"] != "directory"]
