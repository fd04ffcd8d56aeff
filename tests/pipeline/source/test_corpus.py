import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
import s3fs
from fsspec.implementations.local import LocalFileSystem
from servers import BucketServer

from clips import write_clip
from longvlm.pipeline.source.corpus import Source, list_pages, list_source
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


def listed(source, root):
    found, left_out = [], Counter()
    for page in list_pages(source, left_out):
        found += page.to_pylist()
    return {row["uri"].removeprefix(f"{root}/"): row["error_code"] for row in found}, left_out


def test_an_entry_that_cannot_be_stored_is_listed_with_its_reason(folder):
    clip = (folder / "a.mp4").read_bytes()
    with open(os.fsencode(folder) + b"/caf\xe9.mp4", "wb") as file:  # noqa: PTH123 - a name of bytes
        file.write(clip)
    found, _ = listed(Source(str(folder)), folder)
    assert found == {
        "a.mp4": None,
        "caf\\xe9.mp4": "bad_entry",
        "empty.mov": None,
        "headless": None,
        "sub/deep/b.MKV": None,
    }


@pytest.mark.parametrize("seconds", [1e12, -1e14, 1e30, float("nan")])
def test_a_time_that_no_calendar_has_is_the_entry_s_own_trouble(folder, monkeypatch, seconds):
    info = LocalFileSystem.info

    def dated(self, path, **options):
        found = info(self, path, **options)
        return found | {"mtime": seconds} if found["name"].endswith("a.mp4") else found

    monkeypatch.setattr(LocalFileSystem, "info", dated)
    rows = {row["uri"].removeprefix(f"{folder}/"): row for row in list_source(Source(str(folder))).to_pylist()}
    bad = rows.pop("a.mp4")
    assert (bad["error_code"], bad["modified_at"]) == ("bad_entry", None)
    assert str(seconds) in bad["error"]
    assert [row["error_code"] for row in rows.values()] == [None] * 3


def test_companions_and_leftovers_are_left_out_and_counted(folder):
    for name in ("._a.mp4", "@eaDir/a.mp4", ".Trashes/501/c.mp4", "b.mp4.part", "c.crdownload"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    found, left_out = listed(Source(str(folder)), folder)
    assert set(found) == {"a.mp4", "empty.mov", "headless", "sub/deep/b.MKV"}
    assert left_out == {
        "._*": 1, "@eaDir": 1, ".Trashes": 1, ".part": 1, ".crdownload": 1, ".txt": 1, "no ending": 2
    }  # fmt: skip
    assert listed(Source(str(folder), exclude=("*.txt", "*.part")), folder)[1].keys().isdisjoint({".txt", ".part"})


def test_a_bin_that_may_not_be_read_stops_nothing(folder, monkeypatch):
    (folder / ".Trashes").mkdir()
    scandir = os.scandir

    def forbidding(path="."):
        if str(path).endswith(".Trashes"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    found, left_out = listed(Source(str(folder)), folder)
    assert len(found) == 4
    assert left_out[".Trashes"] == 1


def test_a_source_of_other_files_says_what_they_are(tmp_path):
    for name in ("a.srt", "b.srt", "c.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"left out: 3 files \(\.srt 2, \.jpg 1\)"):
        list_source(Source(str(tmp_path)))


@pytest.mark.parametrize(
    "ending",
    [
        *("h264", "264", "h265", "hevc", "obu", "m2t", "mod", "tod", "tp", "mpe", "3gpp"),
        *("mk3d", "insv", "lrv", "360", "m4s", "mp4", "TS"),
    ],
)
def test_endings_that_hold_video_are_listed(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(b"x")
    assert names(Source(str(tmp_path)), tmp_path) == [f"a.{ending}"]


def test_a_raw_stream_that_is_named_is_tried(tmp_path):
    (tmp_path / "camera.bin").write_bytes(b"\0\0\0\1\x67" + bytes(range(200)))
    assert names(Source(str(tmp_path / "camera.bin")), tmp_path) == ["camera.bin"]
    assert names(Source(str(tmp_path / "camera.bin"), include=("camera*",)), tmp_path) == ["camera.bin"]
    with pytest.raises(InputError, match="nothing to index"):
        list_source(Source(str(tmp_path)))


def test_links_to_folders_are_followed_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_clip(elsewhere / "c.mp4", 2)
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "deep" / "self").symlink_to(".")
    (folder / "b link").symlink_to(elsewhere)
    (folder / "a link").symlink_to(elsewhere)
    (folder / "c link").symlink_to(folder / "sub")
    (elsewhere / "back").symlink_to(folder / "sub")
    found, _ = listed(Source(str(folder)), folder)
    assert set(found) == {"a.mp4", "a link/c.mp4", "empty.mov", "headless", "sub/deep/b.MKV"}


@pytest.mark.parametrize(
    "name", ["a%20b", "back\\slash", "tab\tx", "new\nline", "q'uo\"te", "zero\u200bwidth", "#*?[x]", "a::b"]
)
def test_a_source_may_be_called_anything(tmp_path, name):
    write = tmp_path / name / f"{name}.mp4"
    write.parent.mkdir()
    write_clip(write, 2)
    (row,) = list_source(Source(str(write.parent))).to_pylist()
    assert (row["uri"], row["source"], row["error_code"]) == (str(write), str(write.parent), None)


def test_a_source_that_is_not_utf_8_is_a_sentence(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(folder).mkdir()
    with pytest.raises(InputError, match=r"caf\\xe9 is not UTF-8"):
        list_source(Source(folder))
