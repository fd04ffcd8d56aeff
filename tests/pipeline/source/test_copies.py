import os
import re
from datetime import datetime
from pathlib import Path

import fsspec
import pytest

from longvlm.pipeline.source import copies as objects
from longvlm.pipeline.source.copies import canonical_uri, facts, local_copy, locate
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError, TransientError


def failure_of(uri, scratch, family=TerminalError):
    with pytest.raises(family) as caught, local_copy(uri, str(scratch)):
        pass
    assert list(scratch.iterdir()) == []
    return caught.value


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_local_addresses_have_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spellings = ["a.mp4", "./sub/../a.mp4", str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4"]
    assert {canonical_uri(*locate(uri)) for uri in spellings} == {str(tmp_path / "a.mp4")}


def test_a_local_name_may_look_like_an_address_of_fsspec(tmp_path, scratch):
    path = tmp_path / "zip::odd #name?.mp4"
    path.write_bytes(b"x")
    assert canonical_uri(*locate(str(path))) == str(path)
    with local_copy(str(path), str(scratch)) as local:
        assert local == str(path)


def test_remote_addresses_keep_their_scheme():
    assert canonical_uri(*locate("memory://folder/a.mp4")) == "memory:///folder/a.mp4"


def test_an_unknown_protocol_is_a_sentence():
    with pytest.raises(InputError, match="carrier-pigeon"):
        locate("carrier-pigeon://a")


@pytest.mark.parametrize(
    "uri", ["local:///etc/passwd", "LOCAL:///etc/passwd", "generic://file:///etc/passwd", "filecache::file:///etc/passwd",
            "simplecache::/etc/passwd://", "zip:///etc/passwd", "reference://x", "blockcache::local:///etc/passwd"],
)  # fmt: skip
def test_no_other_address_leads_to_local_files(uri):
    with pytest.raises(InputError, match="cannot open"):
        locate(uri)


def test_colons_in_the_name_of_an_object_are_part_of_it(s3, scratch):
    for name in ("a::b.mp4", "a::file:///etc/passwd"):
        s3.put_object(Bucket="bucket", Key=name, Body=b"content")
        uri = f"s3://bucket/{name}"
        assert canonical_uri(*locate(uri)) == uri
        with local_copy(uri, str(scratch)) as path:
            assert Path(path).read_bytes() == b"content"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:SECRET@bucket/a.mp4",
        "https://me:SECRET@host/a.mp4",
        "sftp://me:SEC@RET@host/a.mp4",
        "https://bucket.s3.amazonaws.com/a.mp4?X-Amz-Algorithm=x&X-Amz-Signature=SECRET",
        "https://storage.googleapis.com/b/a.mp4?x=1&x-goog-signature=SECRET",
        "https://account.blob.core.windows.net/c/a.mp4?sv=1&sig=SECRET",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(uri):
    with pytest.raises(InputError, match="leave it out") as caught:
        locate(uri)
    assert not {"SECRET", "SEC", "KEY", "me"} & set(str(caught.value).replace("@", " ").split())


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a:b@c.mp4",
        "s3://arn:aws:s3:us-west-2:1:accesspoint/name/a@b.mp4",
        "abfs://container@account.dfs.core.windows.net/a.mp4",
        "https://host:8080/a.mp4?version=3",
    ],
)
def test_what_only_looks_like_a_secret_is_let_through(uri):
    objects.refuse_secrets(uri)


@pytest.mark.parametrize(
    "name",
    ["../../x.mp4", "a.mp4/..", "a.m\np4", "a." + "x" * 300, "a.mp4;rm -rf x", "-o.mp4", "a. mp4", "a.\0mp4", "a.ü"],
)
def test_the_name_of_an_object_does_not_say_where_its_copy_lies(scratch, monkeypatch, name):
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "info", lambda *_, **__: {"size": 7, "type": "file"})
    monkeypatch.setattr(memory, "get_file", lambda _, __, path, **___: Path(path).write_bytes(b"content"))
    with local_copy(f"memory://fetch/{name}", str(scratch)) as copy:
        assert Path(copy).parent == scratch
        assert re.fullmatch(r"video-\w+(\.[A-Za-z0-9]{1,8})?", Path(copy).name)
        assert Path(copy).read_bytes() == b"content"


def test_pipes_and_devices_are_no_videos(tmp_path, scratch):
    os.mkfifo(tmp_path / "a.mp4")
    for path in (tmp_path / "a.mp4", "/dev/zero"):
        assert failure_of(str(path), scratch).code == ErrorCode.NOT_A_VIDEO
    assert failure_of(str(tmp_path / "a\0.mp4"), scratch).code == ErrorCode.NOT_FOUND


def test_a_server_that_sends_more_than_it_said_is_cut_off(scratch, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/fetch/a.mp4", b"content")
    monkeypatch.setattr(objects, "MAX_OBJECT_BYTES", 3)
    monkeypatch.setattr(type(fs), "info", lambda *_, **__: {"size": None, "type": "file", "name": "/fetch/a.mp4"})
    assert failure_of("memory://fetch/a.mp4", scratch).code == ErrorCode.TOO_LARGE


def test_remote_files_are_fetched_once_and_removed(scratch):
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    with local_copy("memory://fetch/a.mp4", str(scratch)) as path:
        assert Path(path).read_bytes() == b"content"
        assert Path(path).suffix == ".mp4"
    assert list(scratch.iterdir()) == []


def test_copies_are_removed_after_an_error(scratch):
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    with pytest.raises(ZeroDivisionError), local_copy("memory://fetch/a.mp4", str(scratch)):
        1 / 0  # noqa: B018
    assert list(scratch.iterdir()) == []


def test_vanished_files(tmp_path, scratch):
    for uri in (str(tmp_path / "gone.mp4"), "memory://gone.mp4"):
        assert failure_of(uri, scratch).code == ErrorCode.NOT_FOUND


def test_a_folder_is_no_video(scratch, tmp_path):
    (tmp_path / "a.mp4").mkdir()
    assert failure_of(str(tmp_path / "a.mp4"), scratch).code == ErrorCode.NOT_A_VIDEO


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_local_files(tmp_path, scratch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    assert failure_of(str(path), scratch).code == ErrorCode.FORBIDDEN


def test_files_that_do_not_fit(scratch, monkeypatch):
    monkeypatch.setattr(objects, "MAX_OBJECT_BYTES", 3)
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    assert failure_of("memory://fetch/a.mp4", scratch).code == ErrorCode.TOO_LARGE


def test_a_flaky_network_is_tried_again(scratch, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    monkeypatch.setattr(objects, "_BACKOFF_S", 0.001)
    tries = []
    get_file = memory.get_file

    def flaky(fs, remote, path, **options):
        tries.append(path)
        if len(tries) < 3:
            Path(path).write_bytes(b"half")
            raise ConnectionResetError("reset by peer")
        return get_file(fs, remote, path, **options)

    monkeypatch.setattr(memory, "get_file", flaky)
    with local_copy("memory://fetch/a.mp4", str(scratch)) as path:
        assert Path(path).read_bytes() == b"content"
    tries[:] = [""] * -10
    monkeypatch.setattr(memory, "get_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("slow")))
    failure = failure_of("memory://fetch/a.mp4", scratch, TransientError)
    assert failure.code == ErrorCode.NETWORK
    assert "3 tries" in failure.message


def test_s3_objects(s3, scratch):
    s3.put_object(Bucket="bucket", Key="a b/ü.mp4", Body=b"content")
    with local_copy("s3://bucket/a b/ü.mp4", str(scratch)) as path:
        assert Path(path).read_bytes() == b"content"
    assert failure_of("s3://bucket/gone.mp4", scratch).code == ErrorCode.NOT_FOUND


def test_facts_go_by_many_names():
    assert facts({"ETag": '"abc"', "size": 3, "LastModified": datetime.fromisoformat("2026-01-02T03:04:05+01:00")}) == {
        "etag": "abc",
        "size_bytes": 3,
        "modified_at": datetime.fromisoformat("2026-01-02T02:04:05"),
    }
    assert facts({"etag": "x", "size": 1, "updated": "2026-01-02T03:04:05Z"})["modified_at"].hour == 3
    assert facts({"size": 1, "mtime": 0.5})["modified_at"] == datetime.fromisoformat("1970-01-01T00:00:00.500000")
    assert facts({"size": None}) == {"etag": None, "size_bytes": None, "modified_at": None}
