"""The benchmark of bytes: its server, and the whole of it on two small files."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import pytest
import s3fs

import clips
from benchmarks.bytes.__main__ import measure, summary
from benchmarks.bytes.corpus import LongFile, make_corpus
from benchmarks.bytes.server import NAME, DistantBucket
from benchmarks.bytes.watching import Watching


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "small.mp4").write_bytes(b"small")
    (tmp_path / "large.mp4").write_bytes(os.urandom(3 << 20))
    with DistantBucket(tmp_path, delay_s=0) as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        yield bucket


def test_the_server_is_an_s3_bucket_that_counts(bucket, tmp_path):
    fs, content = s3fs.S3FileSystem(skip_instance_cache=True), (tmp_path / "large.mp4").read_bytes()
    bucket.take_counts()
    assert fs.find(NAME) == [f"{NAME}/a folder/small.mp4", f"{NAME}/large.mp4"]
    assert fs.ls(NAME) == [f"{NAME}/a folder", f"{NAME}/large.mp4"]
    assert fs.info(f"{NAME}/large.mp4")["size"] == len(content)
    assert not fs.exists(f"{NAME}/nothing.mp4")
    assert fs.cat_file(f"{NAME}/large.mp4", start=1000, end=2000) == content[1000:2000]
    assert fs.cat_file(f"{NAME}/large.mp4", start=-10) == content[-10:]
    assert fs.cat_file(f"{NAME}/a folder/small.mp4") == b"small"
    assert bucket.take_counts()["bytes"] == {"large.mp4": 1010, "a folder/small.mp4": 5}
    fs.get_file(f"{NAME}/large.mp4", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content
    assert bucket.take_counts()["bytes"] == {"large.mp4": len(content)}


@pytest.mark.usefixtures("bucket")
def test_the_server_refuses_an_object_that_is_not_the_one_meant():
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    etag = fs.info(f"{NAME}/large.mp4")["ETag"]
    meant = {"Bucket": NAME, "Key": "large.mp4", "Range": "bytes=7-10"}
    assert fs.call_s3("get_object", **meant, IfMatch=etag)["ContentRange"].startswith("bytes 7-10/")
    with pytest.raises(OSError, match="PreconditionFailed"):
        fs.call_s3("get_object", **meant, IfMatch='"another"')


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("corpus")
    clip = clips.write_clip(folder / "clip.mp4", 90, size=(96, 64), audio_s=1.0)
    return folder, make_corpus(folder, [clip], 9, least_bytes=50_000, width=96, master_s=20)


def test_files_are_as_they_are_said_to_be(corpus):
    folder, files = corpus
    for file in files:
        with av.open(str(folder / "bucket" / file.name)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            assert len(container.streams.audio) == 1
        starts_s = [float(packet.pts * packet.time_base) for packet in packets if packet.is_keyframe]
        assert {round(after - before, 2) for before, after in pairwise(starts_s)} == {file.group_s}
        assert file.keyframe_bytes == sum(packet.size for packet in packets if packet.is_keyframe)
        content = (folder / "bucket" / file.name).read_bytes()
        if file.form != "mkv":
            assert (content.index(b"moov") < content.index(b"mdat")) == (file.form == "faststart")
    assert {(file.group_s, file.form) for file in files} == {
        (g, f) for g in (2, 5, 10) for f in ("faststart", "mp4", "mkv")
    }
    assert make_corpus(folder, [folder / "clip.mp4"], 9) == files


@pytest.mark.parametrize(("decode", "num_cores"), [("keyframe", 2), ("exact", 1)])
def test_both_ways_of_reading_are_measured(corpus, monkeypatch, decode, num_cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))  # a process each
    folder, files = corpus
    found = measure(folder, files[-2:], 1, decode)
    assert found["equal"]
    assert found["files"] == 2
    assert 0 < found["share_of_bytes"] < 1.2
    assert found["speedup"] > 0


def test_a_difference_in_any_video_is_seen():
    file = LongFile("a.mp4", "clip.mp4", 5, "mp4", 100, 10)
    whole = Watching(4.0, 1.0, 0.1, {"a.mp4": 100}, {"a.mp4": 1}, {"s3://bucket/a.mp4": "x"})
    sparse = replace(whole, wall_s=1.0, sent_bytes={"a.mp4": 12})
    found = summary([file], {"whole": [whole], "ahead": [whole], "sparse": [sparse]})
    assert (found["share_of_bytes"], found["speedup"], found["fallbacks"], found["equal"]) == (0.12, 4.0, 0.0, True)
    other = replace(sparse, digests={"s3://bucket/a.mp4": "y"})
    assert not summary([file], {"whole": [whole], "ahead": [whole], "sparse": [other]})["equal"]
    assert summary([file], {"whole": [whole], "ahead": [whole], "sparse": [whole]})["fallbacks"] == 1.0
