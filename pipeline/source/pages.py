"""Paged listing of the files below a folder of any filesystem: a bucket may hold more than memory does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def pages_below(
    fs: Any, path: str, may_pass_over: Callable[[str], bool] = lambda _: False
) -> Iterator[list[dict[str, Any]]]:
    """List every file below a folder, as the filesystem describes it, page by page and in no order.

    From S3 a page is one answer of the service (1000 keys). Elsewhere it is a folder, which fsspec can list only whole.
    Nothing is kept in fsspec's own cache of listings. Links to folders are followed, but no folder is listed twice:
    links come last, so that a folder has its own name where it has one below `path`.

    Args:
        fs: the filesystem.
        path: of the folder.
        may_pass_over: whether a folder, given with a slash at its end, is listed as a file where it may not be read.

    Raises what the filesystem raises; any other folder that may not be read is an error, and not passed over.
    """
    yield from _s3_pages(fs, path) if "s3" in fs.protocol else _folders(fs, path, may_pass_over)


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


def _folders(fs: Any, path: str, may_pass_over: Callable[[str], bool]) -> Iterator[list[dict[str, Any]]]:
    folders, links, seen = [path], list[str](), set[tuple[int, int]]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        folder = (folders or links).pop()
        try:
            entries = fs.ls(folder, detail=True)
        except PermissionError:
            if not may_pass_over(f"{folder}/"):
                raise
            entries = [{"name": f"{folder}/", "type": "other"}]
        fs.invalidate_cache(folder)
        if "file" in fs.protocol:
            place = Path(folder).stat()
            if (place.st_dev, place.st_ino) in seen:
                continue
            seen.add((place.st_dev, place.st_ino))
        linked = {info["name"] for info in entries if info.get("islink") and os.path.isdir(info["name"])}  # noqa: PTH112
        links += linked
        folders += [info["name"] for info in entries if info["type"] == "directory" and info["name"] != folder]
        yield [info for info in entries if info["type"] != "directory" and info["name"] not in linked]
