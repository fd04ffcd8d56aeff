"""What every request has to pass, and what every answer carries: methods, hosts, the token, limits, headers."""

import asyncio
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from longvlm.jobs.cluster.logs import log
from longvlm.jobs.cluster.resources import SERVE
from longvlm.schemas.errors import InputError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "longvlm_token"
MAX_QUERY_BYTES = 12 << 10  # of an address, behind the question mark
_MAX_PATH_BYTES = 1 << 10
_PIECE_BYTES = 64 << 10
MAX_HEAD_BYTES = 32 << 10  # of a request: its line and headers
MAX_BODY_BYTES = 64 << 10  # of a form
_MAX_FIELDS = 32
_FORM = "application/x-www-form-urlencoded"
_POLICY = (
    "default-src 'self'; img-src 'self'; media-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors "
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with none at all, browsers would not say either where a form comes from
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone, by its address or as `localhost`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """The application behind its guard.

    Args:
        app: what answers.
        host: the address that is listened at. On the loopback only its own names are let through, whatever the port,
            which a tunnel may change; elsewhere also addresses of numbers and this machine's name: a page of another
            site can make its own name lead here, but no number.
        token: that every request has to know, by its cookie, or in `?token=`, which sets it; None: none.
        framed_by: origins whose pages may show these in a frame, as the policy has them.
        takes_forms: POST is let through, for forms of pages from here.
    """

    def __init__(
        self, app: App, host: str, token: str | None, framed_by: str = "'none'", *, takes_forms: bool = False
    ) -> None:
        self._app, self._token = app, token
        self._methods = ("GET", "HEAD", "POST") if takes_forms else ("GET", "HEAD")
        self._headers = {**_HEADERS, "Content-Security-Policy": _POLICY + framed_by}
        self._is_local = is_loopback(host)
        own = {host, "localhost"} if self._is_local else {host, "localhost", socket.gethostname(), socket.getfqdn()}
        self._names = {name.lower() for name in own}
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it in a sentence."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_safe(message: MutableMapping[str, Any]) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            for piece in _pieces(message):
                await send(piece)  # waits until the reader has taken most of what was sent before

        refusal = self._refusal(Request(scope))
        if refusal is not None:
            await refusal(scope, receive, send_safe)
            return
        self._num_requests += 1
        try:
            async with asyncio.timeout(SERVE.request_s):
                await self._app(scope, receive, send_safe)
        except TimeoutError:
            log.warning("an answer took longer than %.0f s and was cut off", SERVE.request_s)
            if not has_begun:
                await busy()(scope, receive, send_safe)
        finally:
            self._num_requests -= 1

    def _refusal(self, request: Request) -> Response | None:
        """What is answered in place of the application; None where it may answer."""
        if request.method not in self._methods:
            allowed = {"Allow": ", ".join(self._methods)}
            return _refused(HTTPStatus.METHOD_NOT_ALLOWED, "Nothing else is done here.", allowed)
        if (refusal := _too_large(request)) is not None:
            return refusal
        if not self._is_own(request.headers.getlist("host")):
            return _refused(HTTPStatus.MISDIRECTED_REQUEST, "This server is not known by that name.")
        site, mode = (request.headers.get(f"sec-fetch-{what}", "") for what in ("site", "mode"))
        if site not in ("", "none", "same-origin") and mode != "navigate":
            return _refused(HTTPStatus.FORBIDDEN, "Pages of other sites get nothing from here.")
        if request.method == "POST" and not _is_from_here(request):
            return _refused(HTTPStatus.FORBIDDEN, "Only forms of pages from here are taken.")
        return self._without_token(request) or (busy() if self._num_requests >= SERVE.requests else None)

    def _is_own(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        name = _without_port(hosts[0].lower())
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local

    def _without_token(self, request: Request) -> Response | None:
        """The refusal of a request that does not know the token, or the way on for one that brings it."""
        if self._token is None or _is_equal(request.cookies.get(COOKIE, ""), self._token):
            return None
        given = request.query_params.get("token", "")
        if not _is_equal(given, self._token):
            said = "This address needs its token: open the one that `longvlm serve` printed."
            return _refused(HTTPStatus.UNAUTHORIZED, said)
        rest = [
            (name, value) for name, value in parse_qsl(request.url.query, keep_blank_values=True) if name != "token"
        ]
        answer = RedirectResponse(_here(request.url.path, rest), HTTPStatus.SEE_OTHER)
        answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict", path="/")
        return answer


def _too_large(request: Request) -> Response | None:
    """The refusal of a request that is larger than any of a browser's here."""
    status, said = None, ""
    if len(request.scope["query_string"]) > MAX_QUERY_BYTES or len(request.scope["path"]) > _MAX_PATH_BYTES:
        status, said = HTTPStatus.REQUEST_URI_TOO_LONG, "That address is too long; ask for less at once."
    elif sum(len(name) + len(value) for name, value in request.scope["headers"]) > MAX_HEAD_BYTES:
        status, said = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "These headers are too long."
    elif "transfer-encoding" in request.headers or _body_bytes(request) > _most_body_bytes(request):
        status, said = HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "A request has no body here, or that of a form."
    return None if status is None else _refused(status, said)


def _body_bytes(request: Request) -> float:
    said = request.headers.get("content-length", "0")
    return int(said) if said.isascii() and said.isdecimal() and len(said) < 12 else float("inf")


def _most_body_bytes(request: Request) -> int:
    is_form = request.headers.get("content-type", "").partition(";")[0].strip().lower() == _FORM
    return MAX_BODY_BYTES if request.method == "POST" and is_form else 0


def _is_from_here(request: Request) -> bool:
    """Whether a POST was sent by a page of this server: browsers name its origin, and no page can change that."""
    origin = urlsplit(request.headers.get("origin", ""))
    is_own = origin.scheme in ("http", "https") and origin.netloc == request.headers["host"]
    return is_own and request.headers.get("sec-fetch-site", "same-origin") == "same-origin"


async def read_form(request: Request, form_token: str) -> dict[str, str]:
    """The fields of a form that a page from here sent, each once.

    Args:
        request: a POST.
        form_token: that the page gave to the form: only who has seen a page knows it. A cookie would be sent by pages
            of other ports of this machine too.

    Raises:
        InputError: it is not whole in time, no form, or lacks the token.
    """
    try:
        async with asyncio.timeout(SERVE.head_s):
            body = await request.body()
        fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict"))
    except (TimeoutError, ClientDisconnect, ValueError) as error:
        raise InputError("this form did not arrive as it should; load its page again.") from error
    if not _is_equal(fields.pop("form_token", ""), form_token):
        raise InputError("the page of this form is older than the server; load it again.")
    return fields


def _pieces(message: MutableMapping[str, Any]) -> Iterator[MutableMapping[str, Any]]:
    """A message with its body in pieces: uvicorn would keep the whole of one for a reader that never takes it."""
    body = message.get("body", b"")
    while len(body) > _PIECE_BYTES:
        yield {**message, "body": body[:_PIECE_BYTES], "more_body": True}
        body = body[_PIECE_BYTES:]
    yield {**message, "body": body} if "body" in message else message


def _here(path: str, query: Iterable[tuple[str, str]]) -> str:
    """An address of this server and of no other: behind two slashes a browser would take the path for a host."""
    asked = urlencode(list(query))
    return "/" + path.lstrip("/\\") + (f"?{asked}" if asked else "")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _is_equal(given: str, token: str) -> bool:
    return secrets.compare_digest(given.encode(), token.encode())


def _refused(status: HTTPStatus, said: str, headers: dict[str, str] | None = None) -> Response:
    return Response(f"{said}\n", status, {"Connection": "close", **(headers or {})}, "text/plain; charset=utf-8")


def busy() -> Response:
    """The answer that asks to come back in a moment."""
    return _refused(HTTPStatus.SERVICE_UNAVAILABLE, "Too much is asked for at once; try again.", {"Retry-After": "2"})


class PunctualProtocol(H11Protocol):
    """HTTP over a connection that ends where a request's head does not arrive, or its answer is not taken, in time.

    For both uvicorn would wait for ever.
    """

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request, so long and no longer."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(SERVE.head_s, transport.abort)
        self._answer_timer = self._head_timer

    def data_received(self, data: bytes) -> None:
        """Take what arrived; between two requests, the time for the next one's head begins with its first byte."""
        is_between = self.cycle is not None and self.cycle.response_complete
        if is_between and self._head_timer.cancelled():
            self._head_timer = self.loop.call_later(SERVE.head_s, self.transport.abort)
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:  # a request began: all of its head is here
            self._head_timer.cancel()
            self._answer_timer.cancel()
            self._answer_timer = self.loop.call_later(
                SERVE.request_s + SERVE.head_s, self._end_unless_taken, self.cycle
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._head_timer.cancel()
        self._answer_timer.cancel()
        super().connection_lost(exc)

    def _end_unless_taken(self, cycle: Any) -> None:
        if self.cycle is cycle and (not cycle.response_complete or self.transport.get_write_buffer_size()):
            self.transport.abort()
