import fsspec
import pytest
from servers import FileServer

from longvlm.pipeline.store.upkeep.versions import delete_old_versions, versioned


@pytest.fixture
def refusing(monkeypatch, s3_environment):
    """Gives a function that leads s3:// to a server which refuses everything with one code."""
    import s3fs

    opened = []

    def lead(status, code):
        body = f"<Error><Code>{code}</Code><Message>no such thing</Message></Error>".encode()
        server = FileServer(lambda *_: (status, {"Content-Type": "application/xml"}, body))
        opened.append(server)
        for name, value in {**s3_environment, "AWS_ENDPOINT_URL": server.__enter__().url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    yield lead
    for server in opened:
        server.__exit__(None, None, None)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_server_without_versions_keeps_none(refusing):
    refusing(501, "NotImplemented")
    assert versioned("s3://bucket/index") is None
    assert delete_old_versions("s3://bucket/index", ["tokens"]) == (0, [])


def test_who_may_not_ask_is_told_what_may_be_kept(refusing):
    refusing(403, "AccessDenied")
    assert "s3:GetBucketVersioning" in versioned("s3://bucket/index")
    num_deleted, (kept,) = delete_old_versions("s3://bucket/index", ["tokens"])
    assert num_deleted == 0
    assert "those in tokens cannot be deleted" in kept


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_never_had_versions_and_a_folder_keep_none(tmp_path):
    assert versioned("s3://bucket/index") is None
    assert versioned(str(tmp_path)) is None


def test_of_other_clouds_it_is_not_known_and_said(monkeypatch):
    monkeypatch.setattr(
        "longvlm.pipeline.store.upkeep.versions.filesystem", lambda _: (fsspec.filesystem("memory"), "b")
    )
    assert "cannot be seen from here" in versioned("gs://bucket/index")
    assert delete_old_versions("gs://bucket/index", ["tokens"]) == (0, [])
