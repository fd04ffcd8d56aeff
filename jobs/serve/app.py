"""The application: addresses and what answers them, and the server around it."""

import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.serve.asking import Asker
from longvlm.jobs.serve.guard import MAX_HEAD_BYTES, Guard, PunctualProtocol, busy, read_form
from longvlm.jobs.serve.media import ChangedError, RangeError, media_file, one_range
from longvlm.jobs.serve.pages import Pages
from longvlm.jobs.serve.pinned import BusyError, ShownStore
from longvlm.jobs.serve.thumbnails import Thumbnails
from longvlm.jobs.serve.verdicts import HumanVerdicts
from longvlm.jobs.serve.videos import find_video, segments_of
from longvlm.schemas.errors import InputError, PipelineError

_KINDS = {".css": "text/css; charset=utf-8", ".mjs": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FOR_GOOD = "private, max-age=86400, immutable"  # of what a write_id names, which never changes


class Media:
    """What pages load beside themselves: bytes of videos, thumbnails, and files of the package.

    Args:
        store: that is shown.
        pages: for what is not there.
    """

    def __init__(self, store: ShownStore, pages: Pages) -> None:
        self._store, self._pages = store, pages
        self.thumbnails = Thumbnails()
        self._files = {path.name: path.read_bytes() for path in (files(__package__) / "static").iterdir()}

    def video(self, request: Request) -> Response:
        """One range of a video's bytes."""
        row = find_video(self._store.pinned(), str(request.path_params["write_id"]))
        if row is None:
            return self._pages.nothing_here()
        file = media_file(row)
        tag = f'"{file.tag}"'
        headers = {"Accept-Ranges": "bytes", "ETag": tag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-range", tag) != tag:
            return Response(status_code=HTTPStatus.PRECONDITION_FAILED, headers=headers)
        asked = request.headers.get("range")
        if asked is None and request.method == "HEAD":
            return Response(headers={**headers, "Content-Length": str(file.size_bytes)}, media_type=file.content_type)
        try:
            start, end = one_range(asked or "", file.size_bytes)
        except RangeError:
            headers["Content-Range"] = f"bytes */{file.size_bytes}"
            return Response(status_code=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=headers)
        data = b"" if request.method == "HEAD" else file.read(start, end)
        headers |= {"Content-Range": f"bytes {start}-{end - 1}/{file.size_bytes}", "Content-Length": str(end - start)}
        return Response(data, HTTPStatus.PARTIAL_CONTENT, headers, file.content_type)

    def thumbnail(self, request: Request) -> Response:
        """The picture of a segment, or of the middle one; a drawing where there is none."""
        pinned = self._store.pinned()
        video = find_video(pinned, str(request.path_params["write_id"]))
        segments = [] if video is None else segments_of(pinned, video["write_id"])
        asked = request.path_params.get("segment")
        if asked is None:
            found = segments[len(segments) // 2 :][:1]
        else:
            found = [row for row in segments if row["segment"] == asked]
        jpeg = None
        if video is not None and found:
            jpeg = self.thumbnails.get(video, found[0])
        if jpeg is None:
            return Response(self._files["no-picture.svg"], media_type=_KINDS[".svg"])
        return Response(jpeg, headers={"Cache-Control": _FOR_GOOD}, media_type="image/jpeg")

    def static(self, request: Request) -> Response:
        """A file of the package, by its name alone."""
        name = request.path_params["name"]
        if name not in self._files:
            return self._pages.nothing_here()
        tag = f'"{hashlib.sha256(self._files[name]).hexdigest()[:16]}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(self._files[name], headers=headers, media_type=_KINDS["." + name.rpartition(".")[2]])


def make_app(
    store: ShownStore,
    host: str,
    token: str | None,
    framed_by: str = "'none'",
    *,
    person: HumanVerdicts | None = None,
    asker: Asker | None = None,
) -> Guard:
    """The pages over a store, behind their guard.

    Args:
        store: that is shown.
        host: the address that is listened at.
        token: that requests have to know; None: none.
        framed_by: see `Guard`.
        person: whose verdicts are taken; None: nothing is written.
        asker: what answers questions; None: nothing.
    """
    pages = Pages(store, person, asker)
    media = Media(store, pages)
    write_id = "{write_id:uuid}"

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        media.thumbnails.close()

    routes = [
        Route("/", pages.library),
        Route(f"/video/{write_id}", pages.video),
        Route("/search", pages.search),
        Route("/ask", pages.ask),
        Route("/questions", pages.questions),
        Route("/runs", pages.runs),
        Route("/sql", pages.sql),
        Route(f"/media/{write_id}", media.video),
        Route(f"/thumbnail/{write_id}", media.thumbnail),
        Route(f"/thumbnail/{write_id}/{{segment:int}}", media.thumbnail),
        Route("/static/{name}", media.static),
    ]
    if person is not None:
        routes += [
            Route("/verdict", _posted(pages.judge, pages.form_token), methods=["POST"]),
            Route("/ask", _posted(pages.keep_answer, pages.form_token), methods=["POST"]),
            Route(f"/video/{write_id}/ask", _posted(pages.keep_answer, pages.form_token), methods=["POST"]),
        ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=_handlers(pages))
    app.router.redirect_slashes = False
    return Guard(app, host, token, framed_by, takes_forms=person is not None)


def _posted(
    act: Callable[[Request, Mapping[str, str]], Response], form_token: str
) -> Callable[[Request], Awaitable[Response]]:
    """What answers a form: it is read here, and acted upon in a thread."""

    async def answer(request: Request) -> Response:
        fields = await read_form(request, form_token)
        return await run_in_threadpool(act, request, fields)

    return answer


def _handlers(pages: Pages) -> dict[Any, Callable[[Request, Exception], Response]]:
    """What is said of each kind of error; mistakes of our own stand in the log, without what was asked."""

    def not_answered(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.NOT_FOUND
        return pages.nothing_here() if status == HTTPStatus.NOT_FOUND else pages.sorry("", HTTPStatus(status))

    def refused(_: Request, error: Exception) -> Response:
        return pages.sorry(str(error), HTTPStatus.GONE if isinstance(error, ChangedError) else HTTPStatus.BAD_REQUEST)

    def failed(_: Request, __: Exception) -> Response:  # it is raised once more, and logged by the server
        return pages.sorry("Something went wrong here; the log says what.", HTTPStatus.INTERNAL_SERVER_ERROR)

    return {
        HTTPException: not_answered,
        BusyError: lambda _, __: busy(),
        InputError: refused,
        PipelineError: refused,
        Exception: failed,
    }


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises InputError where that is taken, or not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=SERVE.connections)
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror or error}; choose another.") from error


def run_server(app: Guard, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C, or the signal to end."""
    config = uvicorn.Config(
        app,
        http=PunctualProtocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,  # addresses hold what was asked
        server_header=False,
        limit_concurrency=SERVE.connections,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=2,
        proxy_headers=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
