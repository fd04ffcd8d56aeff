"""A store in a bucket: an S3 server on the loopback, of which every request is a point of the actor that makes it."""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any
from unittest import mock

import fsspec
import moto.s3.models
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from benchmarks.simulate.world import Killed, Simulation
from longvlm.pipeline.store import delta

_BUCKET = "simulated"
_BYSTANDER = "model"  # who is no actor
_PATIENCE_S = 3600  # of clients, while their actor sleeps
_ACCESS_DENIED = b"<Error><Code>AccessDenied</Code><Message>it is dead</Message></Error>"
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>not now</Message></Error>"
_Response = tuple[str, list[tuple[str, str]], bytes]


class RefusedError(Exception):
    """A request gets no answer, or no good one; its client tries again."""


@contextmanager
def served(world: Simulation) -> Iterator[str]:
    """Serve a bucket while the body runs; yields the address of a store in it.

    Who asks is told by the access key. The dead are refused; so nothing that they try has any effect.
    """
    server = make_server("127.0.0.1", 0, _points(world), threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        environment = {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": _BYSTANDER, "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
        }  # fmt: skip
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.object(moto.s3.models, "utcnow", partial(_now, world)))
        stack.enter_context(mock.patch.object(delta, "storage_options", _keyed(world, delta.storage_options)))
        stack.enter_context(mock.patch.object(fsspec.core, "url_to_fs", _opened(world, fsspec.core.url_to_fs)))
        moto.s3.models.s3_backends.reset()
        s3, _ = fsspec.core.url_to_fs(f"s3://{_BUCKET}")
        s3.call_s3("create_bucket", Bucket=_BUCKET)
        yield f"s3://{_BUCKET}/store"


class _Quiet(MotoRequestHandler):
    """Says nothing on the screen."""

    def log(self, *_: Any) -> None:
        """Nothing."""


def _points(world: Simulation) -> Callable[..., Iterable[bytes]]:
    plain = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        who = re.search(r"Credential=actor(\d+)/", environ.get("HTTP_AUTHORIZATION", ""))
        status, headers, body = _answer(world, plain, environ, int(who[1]) if who else None)
        start_response(status, headers)
        return [body]

    return application


def _answer(world: Simulation, plain: Any, environ: dict[str, Any], actor: int | None) -> _Response:
    def call() -> _Response:
        said: list[Any] = []
        body = b"".join(plain(environ, lambda status, headers, *_: said.extend((status, headers))))
        return said[0], said[1], body

    if actor is None:
        return call()
    writes = environ["REQUEST_METHOD"] not in ("GET", "HEAD")
    try:
        return world.actors[actor].requests(call, writes=writes, refusal=RefusedError)
    except Killed:
        return "403 Forbidden", [("Content-Type", "application/xml")], _ACCESS_DENIED
    except RefusedError:
        return "503 Slow Down", [("Content-Type", "application/xml")], _SLOW_DOWN


def _now(world: Simulation) -> datetime:
    return datetime.fromtimestamp(world.true_s(), UTC).replace(tzinfo=None)


def _key(world: Simulation) -> str:
    actor = world.actor()
    return f"actor{actor.number}" if actor else _BYSTANDER


def _keyed(world: Simulation, plain: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str]]:
    return lambda uri: plain(uri) | {"AWS_ACCESS_KEY_ID": _key(world), "timeout": f"{_PATIENCE_S}s"}


def _opened(world: Simulation, plain: Callable[..., Any]) -> Callable[..., Any]:
    def opened(uri: str, **options: Any) -> Any:
        if not uri.startswith("s3://"):
            return plain(uri, **options)
        patience = {"read_timeout": _PATIENCE_S, "retries": {"max_attempts": 3}}
        return plain(uri, key=_key(world), secret="s", config_kwargs=patience, **options)  # noqa: S106 - of nothing

    return opened
