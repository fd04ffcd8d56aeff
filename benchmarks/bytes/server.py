"""An S3 server on the loopback that answers as late and as slowly as a bucket elsewhere, and counts what it sends.

One bucket, its objects the files below a local folder, read only: HEAD and GET of an object with Range and If-Match,
HEAD of the bucket and ListObjectsV2. It runs in a process of its own, and the kernel copies from file to socket, since
clients are measured on the same cores. `/_counts` tells, without delay, what was sent.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import urlopen
from xml.sax.saxutils import escape

NAME = "bucket"
DELAY_S = 0.03  # before each answer
BYTES_PER_S = 20e6  # of each connection
_CHUNK_BYTES = 256 << 10
_KEYS_PER_PAGE = 1000
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class DistantBucket:
    """A served folder; the environment that leads clients to it is `environment`. It ends with this process."""

    def __init__(self, folder: Path, delay_s: float = DELAY_S) -> None:
        command = [sys.executable, "-m", "benchmarks.bytes.server", str(folder), "--delay", str(delay_s)]
        self._process = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        keys = {"AWS_ACCESS_KEY_ID": "made-up", "AWS_SECRET_ACCESS_KEY": "made-up"}
        regions = {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
        self.environment = {"AWS_ENDPOINT_URL": self.url, **keys, **regions}

    def take_counts(self) -> dict[str, Any]:
        """What was sent since the last look: `bytes` and `requests` by key, and the server's own `cpu_s`."""
        with urlopen(f"{self.url}/_counts") as answer:  # noqa: S310 - our own server
            counts: dict[str, Any] = json.load(answer)
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which the server waits for
        self._process.wait()


class _DistantServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, delay_s: float) -> None:
        self.folder, self.delay_s = folder, delay_s
        self.lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.cpu_s = time.process_time()
        super().__init__(("127.0.0.1", 0), _DistantHandler)

    def take_counts(self) -> bytes:
        """As `DistantBucket.take_counts`."""
        with self.lock:
            now_s = time.process_time()
            counts = {"bytes": self.sent, "requests": self.requests, "cpu_s": now_s - self.cpu_s}
            self.sent, self.requests, self.cpu_s = Counter(), Counter(), now_s
        return json.dumps(counts).encode()

    def list_keys(self) -> list[tuple[str, os.stat_result]]:
        """All objects, in order."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted((path.relative_to(self.folder).as_posix(), path.stat()) for path in files)


class _DistantHandler(BaseHTTPRequestHandler):
    server: _DistantServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/_counts":
            self._answer(200, {"Content-Type": "application/json"}, self.server.take_counts())
            return
        time.sleep(self.server.delay_s)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        if bucket != NAME:
            self._refuse(404, "NoSuchBucket")
        elif key:
            self._object(key)
        else:
            self._answer(200, {"Content-Type": "application/xml"}, self._listing(parse_qs(parts.query)))

    do_HEAD = do_GET  # noqa: N815 - as the library calls it

    def _object(self, key: str) -> None:
        with self.server.lock:
            self.server.requests[key] += 1
        path = self.server.folder / key
        if not path.is_file() or ".." in path.parts:
            self._refuse(404, "NoSuchKey")
            return
        found = path.stat()
        if self.headers.get("If-Match", _etag(key, found)) not in ("*", _etag(key, found), _etag(key, found)[1:-1]):
            self._refuse(412, "PreconditionFailed")
            return
        headers = {
            "ETag": _etag(key, found),
            "Last-Modified": formatdate(found.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        start, end, status = 0, found.st_size, 200
        if asked := _RANGE.fullmatch(self.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else max(found.st_size - int(last), 0)
            end = min(int(last) + 1, found.st_size) if first and last else found.st_size
            if start >= end:
                self._refuse(416, "InvalidRange")
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{found.st_size}"
        self._answer(status, headers | {"Content-Length": str(end - start)})
        if self.command == "GET":
            self._send_file(key, path, start, end)

    def _send_file(self, key: str, path: Path, start: int, end: int) -> None:
        """Send a range at the connection's rate: a chunk is due by the clock, so that one late sleep is made up for."""
        begun_s, place = time.monotonic(), start
        try:
            with path.open("rb") as file:
                while place < end:
                    num_bytes = min(_CHUNK_BYTES, end - place)
                    due_s = begun_s + (place + num_bytes - start) / BYTES_PER_S
                    time.sleep(max(0.0, due_s - time.monotonic()))
                    self._count(key, num_bytes)  # first: once the client has the last byte, all is counted
                    sent = os.sendfile(self.wfile.fileno(), file.fileno(), place, num_bytes)
                    self._count(key, sent - num_bytes)
                    place += sent
        except OSError:
            self.close_connection = True  # the client has gone

    def _count(self, key: str, num_bytes: int) -> None:
        with self.server.lock:
            self.server.sent[key] += num_bytes

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        """ListObjectsV2; the token of a page is the last name of the one before."""
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        most = min(int(query.get("max-keys", [_KEYS_PER_PAGE])[0]), _KEYS_PER_PAGE)
        entries: dict[str, str] = {}
        for key, found in self.server.list_keys():
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                entries[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            else:
                changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.st_mtime))
                entries[key] = (
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{changed}</LastModified>"
                    f"<ETag>{escape(_etag(key, found))}</ETag><Size>{found.st_size}</Size></Contents>"
                )
        names = [name for name in entries if name > after]
        page = names[:most]
        more = len(names) > most
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more and page else ""
        return (
            f"<ListBucketResult><Name>{NAME}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            f"{''.join(entries[name] for name in page)}</ListBucketResult>"
        ).encode()

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code} of the benchmark's server</Message></Error>"
        self._answer(status, {"Content-Type": "application/xml"}, body.encode())

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: who asks is measured."""


def _etag(key: str, found: os.stat_result) -> str:
    said = f"{key} {found.st_size} {found.st_mtime_ns}"
    return f'"{hashlib.md5(said.encode(), usedforsecurity=False).hexdigest()}"'


def main() -> None:
    """Serve a folder until the input ends; the port is the first line of the output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--delay", type=float, default=DELAY_S)
    options = parser.parse_args()
    server = _DistantServer(options.folder, options.delay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
