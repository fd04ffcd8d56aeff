"""A chat model behind any OpenAI-compatible endpoint, as a judge."""

import os
import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx2

from longvlm.pipeline.judging.judges import Messages
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError, TransientError

KEY_VARIABLE = "OPENAI_API_KEY"  # where no other is named
CONCURRENCY = 8  # requests under way: services allow some, and a local server batches them
_PATH = "/chat/completions"
_TRIES = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # doubled from try to try ...
_LONGEST_WAIT_S = 300.0  # ... but what the server asks for is given, up to this
_MAX_SHOWN = 200  # characters of a server's own words

# Tried again; with any other status the same request would fail again.
_TRANSIENT_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}


class _RetryError(Exception):
    """A transient failure of one try, after which another may succeed."""

    def __init__(self, reason: str, code: ErrorCode, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.wait_s = wait_s  # what the server asked for


class HttpChatModel:
    """A chat model at an HTTP endpoint, at temperature 0. Threads may share it."""

    def __init__(self, url: str, model: str, key_variable: str | None = None, timeout_s: float = 60.0) -> None:
        """Prepare, without a request.

        Args:
            url: of the API, such as https://api.openai.com/v1; the path of the endpoint may be in it.
            model: by its name there.
            key_variable: the environment variable that holds the key; None: OPENAI_API_KEY, or no key if it is unset.
            timeout_s: for each phase of a request: connecting, sending, waiting for the reply.

        Raises:
            InputError: the address is none, or the variable with the key is not set or holds no key.
        """
        parts = _split(url)
        key = os.environ.get(key_variable or KEY_VARIABLE, "").strip()
        if key_variable and not key:
            raise InputError(f"the environment variable {key_variable} with the judge's key is not set; export it.")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the environment variable {key_variable or KEY_VARIABLE} holds no key: it has odd signs.")
        self.host = parts.netloc
        self.model = model
        self.name = f"http:{model}@{self.host}"
        self.concurrency = CONCURRENCY
        self._key, self._key_variable = key, key_variable or KEY_VARIABLE
        self._url = parts._replace(path=parts.path.rstrip("/").removesuffix(_PATH) + _PATH).geturl()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
            limits=httpx2.Limits(max_connections=CONCURRENCY),
        )
        self._closed = threading.Event()

    def reply(self, messages: Messages) -> str:
        """The model's reply; transient failures are tried again after growing pauses, or those the server asks for.

        Raises:
            InputError: the key is refused, or there is no such model or endpoint.
            TransientError: NETWORK when the last try failed too.
            TerminalError: JUDGE_FAILED: the request is refused, or what comes back is no chat reply.
        """
        for attempt in range(_TRIES):
            try:
                return self._try(messages)
            except _RetryError as error:
                if attempt + 1 == _TRIES or self._closed.is_set():
                    raise self._out_of_tries_error(error) from error
                self._closed.wait(_pause_s(attempt, error.wait_s))
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """Stop: wake what waits for another try. Requests under way may still be answered, on open connections."""
        self._closed.set()

    def _try(self, messages: Messages) -> str:
        if self._closed.is_set():
            raise _RetryError("the run was stopped", ErrorCode.NETWORK)
        try:
            response = self._client.post(
                self._url, json={"model": self.model, "messages": messages, "temperature": 0}, follow_redirects=False
            )
        except httpx2.HTTPError as error:
            said = self._shown(str(error)) or type(error).__name__
            raise _RetryError(said, ErrorCode.NETWORK) from error
        if response.status_code != HTTPStatus.OK:
            self._refuse(response)
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            said = f"what came back is no chat reply: {self._shown(response.text)}"
            raise _RetryError(said, ErrorCode.JUDGE_FAILED) from error
        if not isinstance(content, str):
            raise _RetryError("its reply holds no text", ErrorCode.JUDGE_FAILED)
        return self._without_key(content.encode("utf-8", "replace").decode())  # a table holds no half surrogates

    def _refuse(self, response: httpx2.Response) -> None:
        """Raise what a status other than OK means."""
        status, said = response.status_code, self._shown(response.text)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise InputError(
                f"the judge at {self.host} refuses access ({status}: {said}); put a valid key into "
                f"{self._key_variable}."
            )
        if status == HTTPStatus.NOT_FOUND:
            raise InputError(
                f"the judge at {self.host} knows no model {self.model}, or has no chat at this address ({status}: "
                f"{said}); check --judge-model and --judge-url."
            )
        if status in _TRANSIENT_STATUSES:
            asked_s = _asked_wait_s(response.headers.get("Retry-After"))
            raise _RetryError(f"{status}: {said}", ErrorCode.NETWORK, asked_s)
        raise TerminalError(ErrorCode.JUDGE_FAILED, f"the judge at {self.host} refused ({status}: {said}).")

    def _out_of_tries_error(self, error: _RetryError) -> TransientError | TerminalError:
        family: Callable[..., Any] = TransientError if error.code == ErrorCode.NETWORK else TerminalError
        return family(error.code, f"the judge at {self.host} gave no reply in {_TRIES} tries ({error}); run again.")

    def _shown(self, text: str) -> str:
        return self._without_key(" ".join(text.split()))[:_MAX_SHOWN]

    def _without_key(self, text: str) -> str:
        """A server may say a key back."""
        return text.replace(self._key, "...") if self._key else text


def _split(url: str) -> SplitResult:
    """The parts of an address. Raises InputError if there is nobody to ask at it, or a secret in it."""
    parts = urlsplit(url)
    try:
        is_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        is_host = False
    if not is_host or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise InputError(
            "the judge's URL must be like https://HOST/v1, without a user or password; a key goes into an "
            "environment variable (--judge-key-env)."
        )
    return parts


def _pause_s(attempt: int, asked_s: float | None) -> float:
    if asked_s is not None:
        return min(asked_s, _LONGEST_WAIT_S)
    return min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.75, 1.25)  # noqa: S311 - spreads tries


def _asked_wait_s(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After header, given as such or as a date (RFC 9110, section 10.2.3); None without one."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
