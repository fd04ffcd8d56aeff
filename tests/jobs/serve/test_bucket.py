"""Videos in a bucket: played and pictured by ranges, under the etag that was listed, and never fetched whole."""

import boto3
import pytest
import stores
from servers import PagesServer

from clips import write_clip
from longvlm import tinyworld
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.serve.media import ChangedError, media_file
from longvlm.jobs.serve.pinned import ShownStore
from longvlm.jobs.serve.thumbnails import Thumbnails
from longvlm.jobs.serve.videos import find_video, segments_of
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.source.ranges import RemoteObject


@pytest.fixture
def read(monkeypatch):
    """How many bytes each read of a remote object asked for."""
    sizes = []
    before = RemoteObject.read

    def counted(self, ranges):
        sizes.append(sum(end - start for start, end in ranges))
        return before(self, ranges)

    monkeypatch.setattr(RemoteObject, "read", counted)
    return sizes


@pytest.fixture(scope="module")
def in_bucket(tmp_path_factory, s3_environment, empty_s3):
    """The address of a store in a bucket, of one video of 6 MB beside it; and the video's bytes."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    clip = write_clip(path, 100, size=(480, 270), gop=25, noise=90, options={"crf": "1"}).read_bytes()
    assert len(clip) > 5 << 20
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        empty_s3()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.put_object(Bucket="bucket", Key="videos/clip.mp4", Body=clip)
        source, store = Source("s3://bucket/videos"), "s3://bucket/store"
        known = {"model": tinyworld.MODEL, "recipe": tinyworld.RECIPE}
        order = IndexOrder(source, store, **known, thumbnails=False, ray_address=IN_PROCESS)
        assert run_index(order).counts.indexed == 1
        yield store, clip
        empty_s3()


def test_a_video_is_read_by_ranges_and_only_as_it_was_indexed(in_bucket, read):
    address, clip = in_bucket
    pinned = ShownStore(address).pinned()
    (row,) = stores.rows(address, "FROM videos")
    video = find_video(pinned, row["write_id"])
    file = media_file(video)
    assert file.read(1000, 3000) == clip[1000:3000]
    made = Thumbnails()
    try:
        pictures = [made.get(video, segment) for segment in segments_of(pinned, row["write_id"])]
    finally:
        made.close()
    assert [picture[:2] for picture in pictures] == [b"\xff\xd8"] * 2
    assert sum(read) < len(clip) / 2
    client, place = boto3.client("s3"), {"Bucket": "bucket", "Key": "videos/clip.mp4"}
    client.put_object(**place, Body=b"another")
    with pytest.raises(ChangedError):
        file.read(0, 5)
    client.put_object(**place, Body=clip)


def test_a_server_plays_out_of_a_bucket(in_bucket):
    address, clip = in_bucket
    (row,) = stores.rows(address, "FROM videos")
    server = PagesServer("--store", address)
    try:
        target = f"/media/{row['write_id']}"
        status, headers, data = server.ask(target, headers={"Range": "bytes=0-"})
        assert (status, headers["Content-Range"]) == (206, f"bytes 0-{SERVE.media_bytes - 1}/{len(clip)}")
        assert data == clip[: SERVE.media_bytes]
        assert server.ask(f"/thumbnail/{row['write_id']}")[1]["Content-Type"] == "image/jpeg"
        assert b"clip.mp4" in server.ask("/")[2]
    finally:
        assert "Traceback" not in server.stop()
