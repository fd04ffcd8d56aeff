import socket

import pytest

from longvlm.pipeline.uris import (
    canonical_uri,
    is_local,
    local_path,
    locate,
    refusals_as_sentences,
    refuse_secrets,
)
from longvlm.schemas.errors import InputError


def test_local_addresses_have_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spellings = ["a.mp4", "./sub/../a.mp4", str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4"]
    assert {canonical_uri(*locate(uri)) for uri in spellings} == {str(tmp_path / "a.mp4")}


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "C:\\a.mp4", "C:a.mp4", "file:a.mp4", "s3:/a.mp4", "zip::odd #name?.mp4", "a~"]
)
def test_a_local_name_may_look_like_another_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    for uri in (name, f"./{name}", str(path), f"file://{path}"):
        assert is_local(uri)
        fs, found = locate(uri)
        assert (fs.cat_file(found), canonical_uri(fs, found)) == (b"x", str(path))


def test_a_tilde_is_home_where_a_path_begins_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a.mp4") == local_path("file://~/a.mp4") == f"{tmp_path}/a.mp4"
    assert local_path("/data/~/a.mp4") == "/data/~/a.mp4"


@pytest.mark.parametrize("uri", ["s3://bucket/a", "memory://a", "local:///a", "FILE:///a", "simplecache::file:///a"])
def test_all_else_is_not_local(uri):
    assert not is_local(uri)


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


@pytest.mark.parametrize("protocol", ["ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs", "github", "data", "HTTP"])
def test_only_protocols_that_are_meant_are_opened(protocol):
    """A look at an address connects to nobody; fsspec's ftp does as soon as it is made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        with pytest.raises(InputError, match="files are read from this machine"):
            locate(f"{protocol}://127.0.0.1:{server.getsockname()[1]}/a.mp4")
        with pytest.raises(TimeoutError):
            server.accept()


def test_colons_in_the_name_of_an_object_are_part_of_it(s3):
    for name in ("a::b.mp4", "a::file:///etc/passwd"):
        s3.put_object(Bucket="bucket", Key=name, Body=b"content")
        fs, path = locate(f"s3://bucket/{name}")
        assert canonical_uri(fs, path) == f"s3://bucket/{name}"
        assert fs.cat_file(path) == b"content"


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
    refuse_secrets(uri)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("x"), "s3://b/x does not exist; check the address."),
        (NotADirectoryError("x"), "s3://b/x does not exist; check the address."),
        (IsADirectoryError("x"), "s3://b/x is a folder; name a file."),
        (PermissionError("no"), "access to s3://b/x is forbidden (no); check its permissions or your credentials."),
        (
            TimeoutError("slow"),
            "s3://b/x cannot be listed: TimeoutError: slow; check the address, the network and your ",
        ),
        (InputError("as it is."), "as it is."),
    ],
)
def test_what_a_filesystem_refuses_is_a_sentence(error, sentence):
    with pytest.raises(InputError) as caught, refusals_as_sentences("s3://b/x", "listed"):
        raise error
    assert str(caught.value).startswith(sentence)
