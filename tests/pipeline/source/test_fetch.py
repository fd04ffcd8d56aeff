"""Downloads from servers that do not do what they should."""

import socket
import threading
import time
from pathlib import Path

import pytest
import s3fs
from servers import BucketServer, FileServer, trickle

from longvlm.pipeline.source import copies, fetch
from longvlm.pipeline.source.copies import local_copy
from longvlm.pipeline.uris import locate
from longvlm.schemas.errors import ErrorCode, PipelineError

VIDEO = b"\0\0\0\x18ftypmp42" + bytes(100_000)
LOGIN = b"<!DOCTYPE html>\n<html><title>Please log in</title></html>"


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(copies, "_BACKOFF_S", 0.001)


@pytest.fixture(scope="module")
def s3_service():
    """One for all tests, since a client of a service takes long to make; the environment leads there."""
    with BucketServer({}) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(s3_service, monkeypatch):
    for name, value in {"objects": {}, "refuse": lambda _: None, "answer": s3_service.answer, "requests": []}.items():
        monkeypatch.setattr(s3_service, name, value)
    return s3_service


@pytest.fixture(params=["http", "s3"])
def server(request):
    """A server that says what a test wants, and whose addresses begin with `base`."""
    if request.param == "s3":
        found = request.getfixturevalue("bucket")
        found.base = "s3://bucket"
        yield found
        return
    with FileServer(says(200)) as found:
        found.base = found.url
        yield found


def failure_of(uri, tmp_path, size_bytes=None):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    with pytest.raises(PipelineError) as caught, local_copy(uri, str(scratch), size_bytes):
        pass
    assert list(scratch.iterdir()) == []
    return caught.value


def says(status, body=b"", **headers):
    return lambda *_: (status, headers, body)


def test_what_was_listed_comes_whole(tmp_path):
    with (
        FileServer(says(200, VIDEO)) as server,
        local_copy(f"{server.url}/a.mp4", str(tmp_path), len(VIDEO)) as path,
    ):
        assert Path(path).read_bytes() == VIDEO
        assert server.requests == [("GET", "/a.mp4")]  # nothing is asked that the listing told


def test_an_address_of_unknown_size_is_taken_as_it_comes(tmp_path):
    """A web server may tell no size, or 0 to HEAD alone."""
    with FileServer(lambda *_: (200, {}, iter([VIDEO[:9], VIDEO[9:]]))) as server:
        for size in (None, 0):
            with local_copy(f"{server.url}/a.mp4", str(tmp_path), size) as path:
                assert Path(path).read_bytes() == VIDEO


@pytest.mark.parametrize("sent", [VIDEO[: len(VIDEO) // 2], VIDEO + b"more", b""])
def test_another_size_than_listed_is_the_networks_fault(tmp_path, server, sent):
    """However well it agrees with its own Content-Length."""
    server.answer = says(200, sent)
    failure = failure_of(f"{server.base}/a.mp4", tmp_path, len(VIDEO))
    assert failure.code == ErrorCode.NETWORK
    assert f"{len(sent)} bytes came where {len(VIDEO)} were listed" in failure.message
    assert len(server.requests) == copies.DOWNLOAD_TRIES


def test_half_a_body_is_tried_again(tmp_path):
    halves = iter([VIDEO[:500], VIDEO])
    with (
        FileServer(lambda *_: (200, {}, next(halves))) as server,
        local_copy(f"{server.url}/a.mp4", str(tmp_path), len(VIDEO)) as path,
    ):
        assert Path(path).read_bytes() == VIDEO


def test_a_large_object_comes_in_one_stream(tmp_path, bucket, monkeypatch):
    """Out of parts that are too short s3fs would make a file of the right size, with holes."""
    fs, _ = locate("s3://bucket/a.mp4")
    monkeypatch.setattr(fs, "default_block_size", 1000)
    bucket.objects["a.mp4"] = VIDEO
    with local_copy("s3://bucket/a.mp4", str(tmp_path), len(VIDEO)) as path:
        assert Path(path).read_bytes() == VIDEO
    assert len(bucket.requests) == 1


@pytest.mark.parametrize(
    ("headers", "page"),
    [
        ({"Content-Type": "text/html"}, LOGIN),
        ({"Content-Type": "video/mp4"}, b"\xef\xbb\xbf\r\n" + LOGIN),
        ({"Content-Type": "application/json"}, b'{"error": "token expired"}'),
        ({}, b'<?xml version="1.0"?><Error/>'),
    ],
)
@pytest.mark.parametrize("size_bytes", [None, 100, len(VIDEO)])
def test_a_page_with_status_200_is_no_video(tmp_path, headers, page, size_bytes):
    with FileServer(says(200, page, **headers)) as server:
        failure = failure_of(f"{server.url}/a.mp4", tmp_path, size_bytes)
    assert failure.code == ErrorCode.NOT_A_VIDEO
    assert "log in" in failure.message
    assert ("Please log in" in failure.message) == (b"Please log in" in page)


def test_a_video_that_calls_itself_a_page_is_one(tmp_path):
    with (
        FileServer(lambda *_: (200, {"Content-Type": "text/html"}, VIDEO)) as server,
        local_copy(f"{server.url}/a.mp4", str(tmp_path), len(VIDEO)) as path,
    ):
        assert Path(path).read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("status", "code", "num_tries"),
    [
        (400, "network", 3),
        (401, "forbidden", 1),
        (403, "forbidden", 1),
        (407, "forbidden", 1),
        (404, "not_found", 1),
        (410, "not_found", 1),
        (408, "network", 3),
        (429, "network", 3),
        (500, "network", 3),
        (502, "network", 3),
        (503, "network", 3),
    ],
)
def test_a_web_servers_status_says_what_is_wrong(tmp_path, status, code, num_tries):
    with FileServer(says(status, b"no")) as server:
        failure = failure_of(f"{server.url}/a.mp4?session=secret", tmp_path, 10)
        assert (failure.code, len(server.requests)) == (code, num_tries)
        asked = failure_of(f"{server.url}/a.mp4", tmp_path)  # and where HEAD is asked first
        assert asked.code == code
    if code != "not_found":
        assert f"the server answered {status}" in failure.message
    assert "secret" not in failure.message or code != "network"


def test_a_server_that_recovers_is_read(tmp_path):
    statuses = iter([500, 429])
    with (
        FileServer(lambda *_: (next(statuses, 200), {}, VIDEO)) as server,
        local_copy(f"{server.url}/a.mp4", str(tmp_path), len(VIDEO)) as path,
    ):
        assert Path(path).read_bytes() == VIDEO


def test_nobody_there_is_the_networks_fault(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        refused = f"http://127.0.0.1:{taken.getsockname()[1]}/a.mp4"
        for uri in (refused, "http://no-such-host.invalid/a.mp4"):
            assert failure_of(uri, tmp_path).code == ErrorCode.NETWORK


def test_a_connection_that_breaks_is_the_networks_fault(tmp_path):
    with FileServer(lambda *_: (200, {"Content-Length": len(VIDEO)}, iter([VIDEO[:100]]))) as server:
        assert failure_of(f"{server.url}/a.mp4", tmp_path, len(VIDEO)).code == ErrorCode.NETWORK


@pytest.mark.parametrize("kind", ["trickles", "stalls", "never answers"])
def test_what_does_not_come_is_given_up(tmp_path, server, monkeypatch, kind):
    ended = threading.Event()

    def answer(*_):
        if kind == "never answers":
            ended.wait()
        return 200, {"Content-Length": len(VIDEO)}, trickle(ended, 0.02 if kind == "trickles" else 100)

    monkeypatch.setattr(fetch, "PROGRESS_S", 0.2)
    server.answer = answer
    failure = failure_of(f"{server.base}/a.mp4", tmp_path, len(VIDEO))
    ended.set()
    assert failure.code == ErrorCode.NETWORK
    assert "in 0.2 s no more than" in failure.message


def test_what_comes_slowly_and_steadily_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PROGRESS_S", 0.2)
    monkeypatch.setattr(fetch, "PROGRESS_BYTES", 100)
    pieces = (VIDEO[i : i + 10_000] for i in range(0, len(VIDEO), 10_000))

    def slowly():
        for piece in pieces:
            time.sleep(0.06)
            yield piece

    with (
        FileServer(lambda *_: (200, {}, slowly())) as server,
        local_copy(f"{server.url}/a.mp4", str(tmp_path), len(VIDEO)) as path,
    ):
        assert Path(path).read_bytes() == VIDEO


@pytest.mark.parametrize(
    ("status", "said", "code"),
    [
        (403, "RequestTimeTooSkewed", "credentials"),
        (403, "InvalidAccessKeyId", "credentials"),
        (403, "SignatureDoesNotMatch", "credentials"),
        (400, "ExpiredToken", "credentials"),
        (400, "InvalidToken", "credentials"),
        (403, "AccessDenied", "forbidden"),
        (403, "InvalidObjectState", "forbidden"),
        (404, "NoSuchKey", "not_found"),
        (404, "NoSuchBucket", "not_found"),
        (400, "MadeUp", "network"),
    ],
)
@pytest.mark.parametrize("size_bytes", [None, 10])
def test_s3_says_who_is_refused(tmp_path, bucket, status, said, code, size_bytes):
    """Whether HEAD was asked before, whose answer has no reason in it, or not."""
    bucket.refuse = lambda _: (status, said)
    failure = failure_of("s3://bucket/a.mp4", tmp_path, size_bytes)
    assert failure.code == code
    assert code == "not_found" or f"{said}: Said by {said}" in failure.message


@pytest.mark.usefixtures("no_keys")
def test_no_keys_at_all_are_the_runs_trouble(tmp_path):
    assert failure_of("s3://bucket/a.mp4", tmp_path, 10).code == ErrorCode.CREDENTIALS
