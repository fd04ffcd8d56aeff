"""Hostile requests: a table of what was tried. None reads or writes what it should not, and the server stays up."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from click.testing import CliRunner
from servers import LARGE_NAME, SCRIPT, SCRIPT_NAME, PagesServer

from longvlm.jobs.cli import main
from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.query.sql import sealed_store
from longvlm.jobs.serve import own_sql
from longvlm.jobs.serve.media import RangeError, one_range
from longvlm.jobs.serve.pinned import ShownStore
from longvlm.jobs.serve.videos import LibraryOrder, library_page
from longvlm.pipeline.store import catalog
from longvlm.schemas.errors import InputError


def said_raw(server, sent, timeout=30):
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as raw:
        raw.sendall(sent)
        return raw.recv(65536)


PATHS = (
    "/etc/passwd", "/static/../pages.py", "/static/..%2fpages.py", "/static/%2e%2e/pages.py", "/static/..%5cpages.py",
    "/static//etc/passwd", "/static/%00", "/static/app.css%00.svg", "/static/", "//evil.example/", "/media/",
    "/media/../../etc/passwd", "/media/%2fetc%2fpasswd", "/media/file:///etc/passwd", "/media/s3://bucket/x",
    "/media/00000000-0000-0000-0000-000000000000", "/video/00000000-0000-7000-8000-000000000000",
    "/video/' OR 1=1 --".replace(" ", "%20"), "/thumbnail/..%2f..%2f/0", "/video/%c0%ae%c0%ae/", "/%ff%fe",
    "/video/x?%ff=%fe",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_out_of_what_is_shown(server, path):
    status, _, data = server.ask(path)
    assert status == 404
    assert b"root:" not in data
    assert b"import" not in data


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "X"])
def test_pages_are_only_read(impatient, method):
    status, headers, _ = impatient.ask("/", method, body=b"")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "host",
    [None, "", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "a b"],
)
def test_a_name_that_another_site_gave_this_machine_is_refused(server, host):
    status, _, data = server.ask("/", headers={"Host": host})
    assert status in (400, 421)
    assert b"tiny-3" not in data


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:9"])
def test_its_own_names_are_let_through(server, host):
    assert server.ask("/", headers={"Host": host})[0] == 200


def test_other_sites_may_link_here_and_load_nothing(server):
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert server.ask("/", headers={**cross, "Sec-Fetch-Mode": "no-cors"})[0] == 403
    assert server.ask("/", headers={**cross, "Sec-Fetch-Mode": "navigate"})[0] == 200


@pytest.mark.parametrize("target", ["/", "/nothing", "/sql?query=x", "/media/1", "/static/app.css", "/static/x"])
def test_every_answer_carries_what_browsers_hold_to(server, target):
    _, headers, _ = server.ask(target)
    assert headers["Content-Security-Policy"].startswith("default-src 'self'; ")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert "server" not in headers


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /?" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\nSet-Cookie: b\r\n b\0\r\n\r\n",
    ],
    ids=["two hosts", "a long header", "a long query", "a long path", "TLS", "a NUL"],
)
def test_what_is_no_request_is_refused(server, sent):
    assert said_raw(server, sent)[9:12] in (b"400", b"414", b"421", b"431", b"")


# --- SQL ---


@pytest.fixture(scope="module")
def pinned(shown):
    """The store as pages have it."""
    return ShownStore(str(shown / "store")).pinned()


@pytest.fixture(scope="module")
def sealed(pinned):
    """What a child opens for its query, here for all of them: none changes it."""
    with sealed_store(pinned.store_uri, made=pinned.copies()) as con:
        yield con


@pytest.fixture
def at_once(sealed, monkeypatch):
    """What a child does with a query is done here: to start one takes a second."""

    def run_here(_, sql, form, values=None):
        with catalog.queries_as_sentences():
            return own_sql._WRITERS[form](sealed, sql, values or {})

    monkeypatch.setattr(own_sql, "run_as", run_here)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM glob('/**')",
        "COPY videos TO '/tmp/longvlm-stolen.csv'",
        "SELECT 1; DROP VIEW videos",
        "UPDATE ledger_videos SET uri = '/etc/passwd'",
        "ATTACH '/tmp/longvlm-stolen.db' AS x",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELECT getenv('HOME')",
        "SELECT " + "(" * 3000 + "1" + ")" * 3000,
        SCRIPT,
    ],
)
def test_a_query_reads_the_store_and_nothing_else(pinned, query):
    with pytest.raises(InputError) as refused:
        own_sql.run_own(pinned, query)
    assert "root:" not in str(refused.value)
    assert not os.path.exists("/tmp/longvlm-stolen.csv")  # noqa: PTH110


@pytest.mark.parametrize("target", ["/sql?query=", "/?where="])
def test_what_a_query_or_predicate_is_refused_for_is_said_as_text(server, target):
    for tried in ("EXISTS (FROM read_text('/etc/passwd'))", SCRIPT):
        status, _, data = server.ask(target + quote(tried))
        assert status == 400
        assert b"root:" not in data
        assert b"<img src=x" not in data


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "where",
    [
        "1 =", "true) UNION ALL SELECT 1 --", "true); DROP VIEW videos; --", "$after_uri = 'x'", "?",
        "uri IN (SELECT content FROM read_text('/etc/passwd'))",
    ],
)  # fmt: skip
def test_a_predicate_does_no_more(pinned, where):
    with pytest.raises(InputError) as refused:
        library_page(pinned, LibraryOrder(where=where))
    assert "root:" not in str(refused.value)


def test_a_query_has_an_end(impatient):
    endless = "SELECT count(*) FROM range(1000000000) a, range(1000000) b"
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(impatient.ask, f"/?where={quote(f'({endless}) > 1')}") for _ in range(3)]
        assert impatient.ask("/runs")[0] == 200  # others are answered meanwhile
        assert sorted(done.result()[0] for done in asked) == [400, 400, 503]


def test_more_than_there_is_room_for_is_refused(server):
    assert server.ask("/sql?query=" + quote("SELECT repeat('x', 4000000000) FROM range(100)"))[0] == 400
    assert server.ask("/sql?form=csv&query=" + quote("SELECT repeat('x', 1000000) FROM range(1000)"))[0] == 400
    status, _, data = server.ask("/sql?query=" + quote("SELECT * FROM range(100000)"))
    assert (status, data.count(b"<tr>")) == (200, SERVE.sql_rows + 1)


# --- bytes of videos ---


def media(videos_by_name, name):
    return f"/media/{videos_by_name[name]['write_id']}"


def test_ranges_are_the_files_own_bytes(server, videos_by_name, shown):
    whole = (shown / "videos" / "hevc.mp4").read_bytes()
    target = media(videos_by_name, "hevc")
    status, headers, data = server.ask(target, headers={"Range": "bytes=10-29"})
    assert (status, data, headers["Content-Range"]) == (206, whole[10:30], f"bytes 10-29/{len(whole)}")
    assert server.ask(target, headers={"Range": "bytes=-5"})[2] == whole[-5:]
    assert server.ask(target, headers={"Range": "bytes=0-", "If-Range": headers["ETag"]})[2] == whole
    assert server.ask(target, headers={"Range": "bytes=0-", "If-Range": '"another"'})[0] == 412
    status, headers, data = server.ask(target, "HEAD")
    assert (status, int(headers["Content-Length"]), data) == (200, len(whole), b"")


@pytest.mark.parametrize(
    "said",
    [
        None, "bytes=0-1,2-3", "bytes=" + ",".join(["0-"] * 1000), "bytes=5-2", "bytes=-0", "bytes=-", "bytes=a-b",
        "bytes=999999999999-", "bytes=0-99999999999999999999999", "items=0-1", "bytes=٣-٤", "bytes= 0-1",
    ],
)  # fmt: skip
def test_only_one_range_is_given_at_a_time(server, videos_by_name, said):
    headers = {} if said is None else {"Range": said.encode()}
    status, headers, data = server.ask(media(videos_by_name, "hevc"), headers=headers)
    assert (status, data) == (416, b"")


def test_a_range_is_cut():
    size = 10 * SERVE.media_bytes
    assert one_range("bytes=7-", size) == (7, 7 + SERVE.media_bytes)
    assert one_range(f"bytes=-{size * 2}", size) == (0, SERVE.media_bytes)
    with pytest.raises(RangeError):
        one_range("bytes=0-", 0)


def test_a_flood_of_ranges_leaves_the_server_up(server, videos_by_name):
    target = media(videos_by_name, "hevc")
    with ThreadPoolExecutor(48) as pool:
        asked = [pool.submit(server.ask, target, headers={"Range": f"bytes={i}-"}) for i in range(144)]
        statuses = {done.result()[0] for done in asked}
    assert statuses <= {206, 503}
    assert server.ask("/")[0] == 200


def test_a_file_that_changed_or_went_is_not_given(shown, videos_by_name, server):
    path = shown / "videos" / f"{SCRIPT_NAME}.mp4"
    kept, times = path.read_bytes(), path.stat()
    try:
        path.write_bytes(b"a secret that took its place")
        status, _, data = server.ask(media(videos_by_name, SCRIPT_NAME), headers={"Range": "bytes=0-"})
        assert status == 410
        assert b"a secret" not in data
        path.unlink()
        os.mkfifo(path)
        assert server.ask(media(videos_by_name, SCRIPT_NAME), headers={"Range": "bytes=0-"})[0] == 410
        path.unlink()
        assert server.ask(media(videos_by_name, SCRIPT_NAME), headers={"Range": "bytes=0-"})[0] == 410
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert server.ask(media(videos_by_name, SCRIPT_NAME), headers={"Range": "bytes=0-"})[2] == kept


# --- slow clients, and the token ---


def test_who_never_ends_a_request_is_hung_up_on(impatient):
    slow = [socket.create_connection(("127.0.0.1", impatient.port), timeout=60) for _ in range(20)]
    for raw in slow:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    assert impatient.ask("/")[0] == 200
    assert {raw.recv(10) for raw in slow} == {b""}  # each is closed from the other side
    assert impatient.ask("/")[0] == 200


def test_who_never_takes_an_answer_is_hung_up_on(impatient, videos_by_name):
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(60)
        raw.connect(("127.0.0.1", impatient.port))
        asked = f"GET {media(videos_by_name, LARGE_NAME)} HTTP/1.1\r\nHost: 127.0.0.1\r\nRange: bytes=0-\r\n\r\n"
        raw.sendall(asked.encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 206")  # and no byte more
        assert impatient.ask("/")[0] == 200
        ours = raw.getsockname()[1]
        for _ in range(600):
            held = psutil.Process(impatient.process.pid).net_connections()
            if ours not in {connection.raddr.port for connection in held if connection.raddr}:
                return
            time.sleep(0.05)
    pytest.fail("it waits for ever")


@pytest.mark.parametrize("headers", [{"Content-Length": "5"}, {"Transfer-Encoding": "chunked"}])
def test_a_request_has_no_body(server, headers):
    assert server.ask("/", headers=headers)[0] == 413


def test_beyond_this_machine_a_token_is_needed(shown):
    server = PagesServer("--store", str(shown / "store"), "--host", "0.0.0.0")
    try:
        token = server.url.partition("?token=")[2]
        assert len(token) > 40
        assert server.ask("/")[0] == 401
        assert server.ask("/static/app.css")[0] == 401
        for wrong in (token[:-1], token + "x", "", "é", token.upper()):
            assert server.ask(f"/?token={quote(wrong)}")[0] == 401
            assert server.ask("/", headers={"Cookie": f"longvlm_token={quote(wrong)}"})[0] == 401
        status, headers, _ = server.ask(f"//evil.example/?a=1&token={token}")
        assert (status, headers["Location"]) == (303, "/evil.example/?a=1")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert server.ask("/", headers={"Cookie": cookie.partition(";")[0]})[0] == 200
        assert server.ask("/", headers={"Cookie": cookie.partition(";")[0], "Host": "evil.example"})[0] == 421
    finally:
        logged = server.stop()
    assert token not in logged


# --- what the process is ---


def test_a_server_loads_no_ray_and_no_torch_where_no_model_is_asked_for(impatient, server):
    assert impatient.ask("/")[0] == 200
    loaded = Path(f"/proc/{impatient.process.pid}/maps").read_text()
    assert [name for name in ("_raylet", "libtorch", "tokenizers") if name in loaded] == []
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in loaded  # which is how one would see it
    assert "_raylet" not in loaded


def test_without_its_libraries_it_says_what_to_install(shown, monkeypatch):
    monkeypatch.setattr("longvlm.jobs.serve.command.find_spec", lambda _: None)
    done = CliRunner().invoke(main, ["serve", "--store", str(shown / "store")])
    assert done.exit_code == 2
    assert "pip install 'longvlm-index[serve]'" in done.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--store", "nowhere"], "there is no store"),
        (["--store", "{store}", "--write", "a b"], "cannot stand in a verdict"),
        (["--host", "192.0.2.1", "--store", "{store}"], "cannot listen at 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(shown, options, sentence):
    done = CliRunner().invoke(main, ["serve", "--quiet", *(option.format(store=shown / "store") for option in options)])
    assert done.exit_code == 2
    assert sentence in done.output
