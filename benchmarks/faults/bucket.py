"""A faulty S3 server on the loopback: out of reach, silent, failing, slow or short of bytes on demand."""

import logging
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Literal, Self

import boto3  # type: ignore[import-untyped]
import s3fs
from moto import server as moto
from werkzeug.serving import make_server

NAME = "bucket"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset
_SILENCE_S = 45.0


class FaultyBucket:
    """A bucket served by moto, behind a layer that hurts requests. The environment leads every client to it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.outage: Literal["reset", "silent"] | None = None  # of everything
        self.trouble = 0.0  # the share of reads of videos that end in an error 500, a reset or a second's delay
        self.short = 0.0  # the share of reads of videos whose answer ends early, whatever it says of its length
        self.num_hurt = 0
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # of half a request it says so
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)  # type: ignore[attr-defined]
        self._server = make_server("127.0.0.1", 0, self._hurt, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _hurt(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self.outage == "reset":
            return self._reset(environ)
        if self.outage == "silent":
            self.num_hurt += 1
            until = time.monotonic() + _SILENCE_S
            while self.outage and time.monotonic() < until:
                time.sleep(0.05)
        is_video = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".mp4")
        if is_video and self.rng.random() < self.trouble:
            self.num_hurt += 1
            kind = self.rng.randrange(3)
            if kind == 0:
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            if kind == 1:
                return self._reset(environ)
            time.sleep(1)
        if is_video and self.rng.random() < self.short:
            return self._cut(environ, start_response)
        return self._app(environ, start_response)

    def _cut(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer with the first bytes of an object: less than Content-Length says, or as many as it says."""
        self.num_hurt += 1
        said: list[Any] = []
        whole = b"".join(self._app(environ, lambda *answer: said.extend(answer)))
        status, headers = said[:2]
        part = whole[: self.rng.randrange(len(whole))]
        if self.rng.random() < 0.5:
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(part))))
        start_response(status, headers)
        return [part]  # after which the server closes the connection

    def _reset(self, environ: dict[str, Any]) -> Iterable[bytes]:
        """Cut the connection as a firewall does."""
        self.num_hurt += 1
        connection: socket.socket = environ["werkzeug.socket"]
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        raise ConnectionAbortedError  # which the server takes quietly

    def __enter__(self) -> Self:
        self._thread.start()
        settings = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "AWS_ACCESS_KEY_ID": "made-up",
            "AWS_SECRET_ACCESS_KEY": "made-up",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ.update(settings)
        s3fs.S3FileSystem.clear_instance_cache()
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket=NAME)
        return self

    def __exit__(self, *_: object) -> None:
        self.outage = None
        self._server.shutdown()
        self._thread.join()
