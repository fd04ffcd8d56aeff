"""How much of a listing is in memory, page by page, and what becomes of one that breaks off."""

import gc
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet
from s3fs import S3FileSystem

from longvlm.pipeline.source import corpus, pages
from longvlm.pipeline.source.corpus import Source, spool_source
from longvlm.pipeline.source.pages import pages_below
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import LISTING

S3_PAGE = 20  # keys, by our wish; a thousand otherwise


class Counted(dict):
    """A description of a file that knows how many of its kind are alive."""

    alive = most = 0

    def __init__(self, *args, **known):
        super().__init__(*args, **known)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


@pytest.fixture
def counted(monkeypatch):
    """Counts the facts of files that are held at the same time."""
    facts = corpus.facts
    monkeypatch.setattr(corpus, "facts", lambda info: Counted(facts(info)))
    gc.collect()
    Counted.alive = Counted.most = 0
    return Counted


@pytest.fixture
def short_pages(monkeypatch):
    """Lets S3 answer in short pages, so that several do not take thousands of objects."""
    call_s3 = S3FileSystem.call_s3

    def asking_for_few(self, method, **request):
        few = {"MaxKeys": S3_PAGE} if method == "list_objects_v2" else {}
        return call_s3(self, method, **request, **few)

    monkeypatch.setattr(S3FileSystem, "call_s3", asking_for_few)


def spooled(uri, path):
    number = spool_source(Source(uri), str(path))
    uris = parquet.read_table(path)["uri"].to_pylist()
    assert len(uris) == len(set(uris)) == number
    return uris


@pytest.mark.usefixtures("short_pages")
def test_of_a_bucket_two_pages_are_held_at_most(s3, tmp_path, counted, monkeypatch):
    for i in range(110):
        s3.put_object(Bucket="bucket", Key=f"v/{i:04}.mp4", Body=b"x")
    described = pages._described
    monkeypatch.setattr(pages, "_described", lambda *entry: Counted(described(*entry)))
    assert len(spooled("s3://bucket/v", tmp_path / "listing.parquet")) == 110
    assert S3_PAGE < counted.most <= 4 * S3_PAGE  # of each file of two pages: what S3 says, and the facts
    assert counted.alive == 0


def test_rows_of_a_listing_go_to_the_disk_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_ROW_GROUP", 100)
    fs = fsspec.filesystem("memory")
    for i in range(40):
        fs.pipe({f"/rows/{i}/{j}.mp4": b"x" for j in range(25)})
    assert len(spooled("memory://rows", tmp_path / "listing.parquet")) == 1000
    groups = parquet.ParquetFile(tmp_path / "listing.parquet").metadata
    assert {groups.row_group(i).num_rows for i in range(groups.num_row_groups)} == {100}


def test_of_a_tree_a_folder_or_two_are_held(tmp_path, counted):
    for i in range(30):
        folder = tmp_path / "tree" / str(i % 5) / str(i)
        folder.mkdir(parents=True)
        for j in range(20):
            (folder / f"{j}.mp4").touch()
    assert len(spooled(str(tmp_path / "tree"), tmp_path / "listing.parquet")) == 600
    assert 20 <= counted.most <= 40
    assert counted.alive == 0


def test_nothing_is_an_empty_listing(s3, tmp_path):
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    assert spooled(str(tmp_path / "empty"), tmp_path / "listing.parquet") == []
    assert parquet.read_schema(tmp_path / "listing.parquet") == LISTING
    s3.put_object(Bucket="bucket", Key="none/folder/", Body=b"")
    assert spooled("s3://bucket/none", tmp_path / "listing.parquet") == []


def test_keys_that_stand_for_folders_are_no_files(s3, tmp_path):
    for key in ("v/", "v/a.mp4", "v/sub/", "v/sub.mp4/", "v/sub/b.mp4"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"x" if key.endswith("4") else b"")
    fs, path = fsspec.core.url_to_fs("s3://bucket/v")
    found = [info["name"] for page in pages_below(fs, path) for info in page]
    assert sorted(found) == ["bucket/v/a.mp4", "bucket/v/sub/b.mp4"]
    assert sorted(spooled("s3://bucket/v/", tmp_path / "l.parquet")) == [
        "s3://bucket/v/a.mp4",
        "s3://bucket/v/sub/b.mp4",
    ]


def test_a_bucket_as_a_whole_is_a_source_and_a_prefix_no_beginning_of_a_name(s3, tmp_path):
    for key in ("v/a.mp4", "v2/b.mp4", "v.mp4"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"x")
    assert len(spooled("s3://bucket", tmp_path / "all.parquet")) == 3
    assert spooled("s3://bucket/v", tmp_path / "v.parquet") == ["s3://bucket/v/a.mp4"]


def test_a_deep_tree_is_listed_to_its_end(tmp_path):
    fs = fsspec.filesystem("memory")
    folder = "/deep"
    for level in range(200):
        folder += f"/{level % 10}"
        fs.pipe_file(f"{folder}/{level}.mp4", b"x")
    assert len(spooled("memory://deep", tmp_path / "listing.parquet")) == 200


def test_nothing_of_a_listing_stays_in_the_cache_of_fsspec(s3, tmp_path):
    for i in range(30):
        s3.put_object(Bucket="bucket", Key=f"v/{i % 3}/{i}.mp4", Body=b"x")
    assert len(spooled("s3://bucket/v", tmp_path / "listing.parquet")) == 30
    fs, _ = fsspec.core.url_to_fs("s3://bucket/v")
    assert sum(len(files) for files in fs.dircache.values()) <= 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError("Access Denied"), r"access to s3://bucket/v is forbidden \(Access Denied\)"),
        (TimeoutError("read timed out"), "s3://bucket/v cannot be listed: TimeoutError: read timed out"),
    ],
)
@pytest.mark.usefixtures("short_pages")
def test_a_second_page_that_fails_is_a_sentence(s3, tmp_path, monkeypatch, error, words):
    for i in range(S3_PAGE + 10):
        s3.put_object(Bucket="bucket", Key=f"v/{i:04}.mp4", Body=b"x")
    fs, _ = fsspec.core.url_to_fs("s3://bucket/v")
    call_s3 = fs.call_s3

    def breaks_off(method, **request):
        if "ContinuationToken" in request:
            raise error
        return call_s3(method, **request)

    monkeypatch.setattr(fs, "call_s3", breaks_off)
    with pytest.raises(InputError, match=words):
        spool_source(Source("s3://bucket/v"), str(tmp_path / "listing.parquet"))


def test_a_folder_that_goes_away_meanwhile_is_a_sentence(tmp_path, monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe({"/going/a/1.mp4": b"x", "/going/b/2.mp4": b"x"})
    ls = MemoryFileSystem.ls

    def vanishing(self, path, detail=True, **options):  # noqa: FBT002 - fsspec's own signature
        if path.endswith("/a"):
            raise FileNotFoundError(path)
        return ls(self, path, detail=detail, **options)

    monkeypatch.setattr(MemoryFileSystem, "ls", vanishing)
    with pytest.raises(InputError, match="does not exist"):
        spool_source(Source("memory://going"), str(tmp_path / "listing.parquet"))


def test_a_folder_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "v" / "sub").mkdir(parents=True)
    (tmp_path / "v" / "a.mp4").touch()
    scandir = os.scandir

    def failing(path="."):
        if str(path).endswith("sub"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(InputError, match="cannot be listed: OSError"):
        spool_source(Source(str(tmp_path / "v")), str(tmp_path / "listing.parquet"))
