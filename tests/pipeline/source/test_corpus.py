import os
from datetime import UTC, datetime

import fsspec
import pytest
import s3fs
from servers import BucketServer

from clips import write_clip
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id
from longvlm.schemas.tables import LISTING
from support import missing


def names(source, root):
    return [row["uri"].removeprefix(f"{root}/") for row in list_source(source).to_pylist()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    write_clip(tmp_path / "sub" / "deep" / "b.MKV", 2)
    write_clip(tmp_path / "a.mp4", 2)
    (tmp_path / "headless").write_bytes((tmp_path / "a.mp4").read_bytes())
    (tmp_path / "empty.mov").touch()
    (tmp_path / "empty").touch()
    (tmp_path / "README").write_text("text " * 100)
    (tmp_path / "notes.txt").write_text("text")
    return tmp_path


def test_a_folder_is_listed_recursively_by_extension_or_content(folder):
    listing = list_source(Source(str(folder)))
    assert listing.schema == LISTING
    rows = listing.to_pylist()
    assert [row["uri"].removeprefix(f"{folder}/") for row in rows] == [
        "a.mp4",
        "empty.mov",
        "headless",
        "sub/deep/b.MKV",
    ]
    first = rows[0]
    assert first["video_id"] == video_id(str(folder / "a.mp4"))
    assert first["source"] == str(folder)
    assert first["size_bytes"] == (folder / "a.mp4").stat().st_size
    assert first["etag"] is None
    assert abs(first["modified_at"].replace(tzinfo=UTC).timestamp() - (folder / "a.mp4").stat().st_mtime) < 1e-3


def test_patterns_are_relative_to_the_source(folder):
    assert names(Source(str(folder), include=("*.mp4", "sub/*")), folder) == ["a.mp4", "sub/deep/b.MKV"]
    assert names(Source(str(folder), exclude=("sub/*", "empty*")), folder) == ["a.mp4", "headless"]


def test_one_video_is_a_source(folder):
    assert names(Source(str(folder / "a.mp4")), folder) == ["a.mp4"]
    assert names(Source(str(folder / "headless")), folder) == ["headless"]
    assert names(Source(f"file://{folder}/a.mp4"), folder) == ["a.mp4"]


def test_links_count_as_files_of_their_own(folder):
    (folder / "link.mp4").symlink_to(folder / "a.mp4")
    (folder / "dangling.mp4").symlink_to(folder / "gone.mp4")
    found = {row["uri"]: row for row in list_source(Source(str(folder), include=("*.mp4",))).to_pylist()}
    assert len(found) == 3
    assert found[str(folder / "link.mp4")]["size_bytes"] == (folder / "a.mp4").stat().st_size
    before = found[str(folder / "link.mp4")]["modified_at"]
    os.utime(folder / "a.mp4", (1e9, 1e9))
    after = list_source(Source(str(folder / "link.mp4"))).to_pylist()[0]["modified_at"]
    assert after < before
    (folder.parent / "elsewhere").symlink_to(folder)
    assert len(list_source(Source(str(folder.parent / "elsewhere")))) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "nothing to index: .*mp4.*webm"),
        (lambda path: path.write_text("text"), "nothing to index"),
        (lambda _: None, "does not exist"),
    ],
)
def test_sources_without_videos_are_sentences(tmp_path, make, words):
    make(tmp_path / "source")
    with pytest.raises(InputError, match=words):
        list_source(Source(str(tmp_path / "source")))


def test_patterns_that_leave_nothing_are_named(folder):
    with pytest.raises(InputError, match="that the include and exclude patterns let through"):
        list_source(Source(str(folder), include=("*.webm",)))


def test_forbidden_folders_stop_the_listing(folder, monkeypatch):
    scandir = os.scandir

    def forbidding(path="."):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(InputError, match=r"forbidden .*deep"):
        list_source(Source(str(folder)))


def test_memory_and_other_filesystems():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/corpus/x/a.mp4", b"12345")
    row = list_source(Source("memory://corpus")).to_pylist()[0]
    assert (row["uri"], row["size_bytes"]) == ("memory:///corpus/x/a.mp4", 5)
    assert isinstance(row["modified_at"], datetime)


def test_buckets_are_listed_with_etags(s3, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", 2).read_bytes()
    for key in ("v/a.mp4", "v/sub/headless", "v/empty.mp4", "v/notes.txt", "other/b.mp4"):
        body = clip if "a" in key.rsplit("/", 1)[-1] else b""
        s3.put_object(Bucket="bucket", Key=key, Body=body)
    s3.put_object(Bucket="bucket", Key="v/folder/", Body=b"")
    rows = list_source(Source("s3://bucket/v/")).to_pylist()
    assert [row["uri"] for row in rows] == [
        "s3://bucket/v/a.mp4",
        "s3://bucket/v/empty.mp4",
        "s3://bucket/v/sub/headless",
    ]
    assert rows[0]["source"] == "s3://bucket/v"
    assert rows[0]["etag"].isalnum()
    assert rows[0]["size_bytes"] == len(clip)
    assert rows[0]["modified_at"].year >= 2025
    assert len(list_source(Source("s3://bucket/v/a.mp4"))) == 1


@pytest.mark.parametrize(
    ("uri", "words"), [("s3://no-such-bucket", "does not exist"), ("s3://bucket/none", "does not exist")]
)
@pytest.mark.usefixtures("s3")
def test_buckets_that_are_not_there(uri, words):
    with pytest.raises(InputError, match=words):
        list_source(Source(uri))


@pytest.fixture(scope="module")
def refusing():
    """An S3 service that refuses what a test wants."""
    with BucketServer({"v/a.mp4": b"x"}) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken"), (403, "RequestTimeTooSkewed")]
)
@pytest.mark.parametrize("name", ["v", "v/a.mp4", "list.csv"])
def test_a_bucket_that_refuses_says_why(refusing, name, status, code):
    """HEAD has no reason in its answer."""
    refusing.refuse = lambda _: (status, code)
    with pytest.raises(InputError, match=rf"access to s3://bucket/{name} is forbidden \({code}: Said by {code}\)"):
        list_source(Source(f"s3://bucket/{name}"))


def test_a_folder_is_listed_where_only_that_is_allowed(refusing):
    refusing.refuse = lambda key: (403, "AccessDenied") if key else None
    assert len(list_source(Source("s3://bucket/v"))) == 1


@pytest.mark.corpus
def test_real_clips_are_all_listed(videos):
    beside = {".md", ".csv", ".jsonl"}  # what is said of clips, and lists of them
    clips = [path for path in videos.glob("*/*") if path.suffix.lower() not in beside] or missing(videos, "clips")
    listed = names(Source(str(videos)), videos)
    assert listed == sorted(str(path.relative_to(videos)) for path in clips)
