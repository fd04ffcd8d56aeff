"""Byte ranges of a remote object, read in parallel and each held to the etag that was listed."""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from longvlm.pipeline.source.copies import facts
from longvlm.pipeline.source.fetch import FetchError, WholeNeededError
from longvlm.pipeline.uris import locate

Range = tuple[int, int]  # [start, end) in bytes
_AT_A_TIME = 16  # requests: what hides 30 ms of each, and no server minds
_SLOWEST_BYTES_S = 4096.0  # as for whole objects, see `fetch.PROGRESS_S`
_ATTEMPTS_S = 60.0
_CONNECT_S = 10.0


REPLACED = "replaced"  # since it was listed, or its server cannot tell


class RemoteObject:
    """A remote object as it was listed: its bytes by ranges, never those of an object that took its place.

    Args:
        uri: of the object.
        etag: as it was listed, without quotes.
    """

    def __init__(self, uri: str, etag: str) -> None:
        self.fs, self.path = locate(uri)
        self.etag = etag
        self.num_bytes_read = 0
        # A bare request to a signed address costs a sixth of the CPU that the S3 library takes for one.
        self._signed: str | None = None
        self._to_sign = "s3" in self._protocols  # not yet: without keys it fails, as every read does

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, in order.

        Raises:
            WholeNeededError: the object was replaced, or its server gives no ranges of one etag.
            FetchError: fewer bytes came than were asked for, or too slowly.

        And what the filesystem raises, see `refusals.code_of`.
        """
        if self._to_sign:
            self._signed, self._to_sign = self.fs.url(self.path), False
        if self.fs.async_impl:
            from fsspec.asyn import sync

            pieces: list[bytes] = sync(self.fs.loop, self._read_all, ranges)
        else:
            pieces = [self.fs.cat_file(self.path, start=start, end=end) for start, end in ranges]
        if not self._is_conditional:
            self._check_etag()
        for (start, end), piece in zip(ranges, pieces, strict=True):
            if len(piece) != end - start:
                raise FetchError(f"{len(piece)} bytes came where {end - start} were asked for")
            self.num_bytes_read += len(piece)
        return pieces

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self.fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    @property
    def _is_conditional(self) -> bool:
        """Whether each range can be asked for under the condition that the etag still holds."""
        return "s3" in self._protocols or "http" in self._protocols

    def _check_etag(self) -> None:
        """Raise WholeNeededError unless the object has its etag after its bytes were read, as it had when listed."""
        self.fs.invalidate_cache(self.path)
        if facts(self.fs.info(self.path))["etag"] != self.etag:
            raise WholeNeededError(REPLACED)

    async def _read_all(self, ranges: Sequence[Range]) -> list[bytes]:
        free = asyncio.Semaphore(_AT_A_TIME)
        one = (
            self._read_s3 if "s3" in self._protocols else self._read_http if self._is_conditional else self._read_other
        )

        async def read(start: int, end: int) -> bytes:
            async with free:
                limit_s = _ATTEMPTS_S + (end - start) / _SLOWEST_BYTES_S
                try:
                    return await asyncio.wait_for(one(start, end), limit_s)
                except TimeoutError as error:
                    raise FetchError(f"in {limit_s:.0f} s not all of {end - start} bytes came") from error

        tasks = [asyncio.ensure_future(read(start, end)) for start, end in ranges]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # none goes on alone after another has failed
                task.cancel()

    async def _read_s3(self, start: int, end: int) -> bytes:
        if self._signed is not None and (data := await self._read_signed(self._signed, start, end)) is not None:
            return data
        bucket, key, _ = self.fs.split_path(self.path)
        asked = {"Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{self.etag}"'}
        try:
            answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **asked)  # noqa: SLF001
        except OSError as error:
            if _is_unmet(error):
                raise WholeNeededError(REPLACED) from error
            raise
        async with answer["Body"] as body:
            return bytes(await body.read())

    async def _read_signed(self, url: str, start: int, end: int) -> bytes | None:
        """A range by a bare request; None where only the library can tell what is in the way: a proxy, or rights."""
        from aiohttp import ClientError, ClientTimeout
        from fsspec import filesystem

        session = await filesystem("http").set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Match": f'"{self.etag}"', "Accept-Encoding": "identity"}
        try:
            async with session.get(
                url, headers=headers, timeout=ClientTimeout(total=None, connect=_CONNECT_S)
            ) as answer:
                if answer.status == HTTPStatus.PARTIAL_CONTENT:
                    data: bytes = await answer.read()
                    return data
        except (ClientError, TimeoutError, OSError):
            self._signed = None
        return None

    async def _read_http(self, start: int, end: int) -> bytes:
        session = await self.fs.set_session()
        headers = {**self.fs.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        headers |= {"If-Match": f'"{self.etag}"', "Accept-Encoding": "identity"}
        options = {**self.fs.kwargs, "headers": headers}
        async with session.get(self.fs.encode_url(self.path), **options) as answer:
            if answer.status in (HTTPStatus.OK, HTTPStatus.PRECONDITION_FAILED):  # the whole, or another
                raise WholeNeededError(REPLACED)
            self.fs._raise_not_found_for_status(answer, self.path)  # noqa: SLF001
            if answer.headers.get("ETag", "").strip('"') != self.etag:  # a weak one says nothing of bytes
                raise WholeNeededError(REPLACED)
            data: bytes = await answer.read()
        return data

    async def _read_other(self, start: int, end: int) -> bytes:
        data: bytes = await self.fs._cat_file(self.path, start=start, end=end)  # noqa: SLF001
        return data


def _is_unmet(error: BaseException) -> bool:
    """Whether the service says that a condition was not met."""
    answer: Any = getattr(error.__cause__ or error, "response", None)
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    return status == HTTPStatus.PRECONDITION_FAILED
