import os
import re
from datetime import datetime
from pathlib import Path

import fsspec
import pytest

from longvlm.pipeline.source import copies, fetch
from longvlm.pipeline.source.copies import facts, local_copy
from longvlm.schemas.errors import ErrorCode, TerminalError, TransientError


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


def test_a_local_name_that_looks_like_an_address_of_fsspec_is_read_in_place(tmp_path, scratch):
    path = tmp_path / "zip::odd #name?.mp4"
    path.write_bytes(b"x")
    with local_copy(str(path), str(scratch)) as local:
        assert local == str(path)


def test_an_object_that_looks_like_a_chain_of_addresses_is_fetched(s3, scratch):
    s3.put_object(Bucket="bucket", Key="a::file:///etc/passwd", Body=b"content")
    with local_copy("s3://bucket/a::file:///etc/passwd", str(scratch)) as path:
        assert Path(path).read_bytes() == b"content"


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
    monkeypatch.setattr(fetch, "MAX_OBJECT_BYTES", 3)
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
    monkeypatch.setattr(fetch, "MAX_OBJECT_BYTES", 3)
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    assert failure_of("memory://fetch/a.mp4", scratch).code == ErrorCode.TOO_LARGE


def test_a_flaky_network_is_tried_again(scratch, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    fsspec.filesystem("memory").pipe_file("/fetch/a.mp4", b"content")
    monkeypatch.setattr(copies, "_BACKOFF_S", 0.001)
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


def test_a_link_that_leads_back_to_itself_is_not_the_network(tmp_path):
    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    with (
        pytest.raises(TerminalError, match="a link that leads back to itself") as caught,
        local_copy(str(tmp_path / "a.mp4"), str(tmp_path)),
    ):
        pass
    assert caught.value.code == ErrorCode.NOT_FOUND


def test_a_name_that_is_too_long_is_not_the_network(tmp_path):
    with pytest.raises(TerminalError, match="too long") as caught, local_copy(f"{tmp_path}/{'x' * 300}", str(tmp_path)):
        pass
    assert caught.value.code == ErrorCode.NOT_FOUND
