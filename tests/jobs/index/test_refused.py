"""Buckets that refuse a video, or everything."""

import pytest
import s3fs
from servers import BucketServer
from stores import rows

from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source

NUM_VIDEOS = 6


@pytest.fixture
def bucket(clips, monkeypatch):
    contents = [(clips / f"clip-{i:02}.mp4").read_bytes() for i in (0, 4, 8)]
    with BucketServer({f"v/{i}.mp4": contents[i % 3] for i in range(NUM_VIDEOS)}) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


def index(tmp_path, model, **settings):
    """The report of a run over the bucket, and the rows of the store."""
    report = run_index(IndexOrder(Source("s3://bucket/v"), str(tmp_path / "store"), model, "tiny", **settings))
    return report, rows(tmp_path / "store", "SELECT uri, status, error_code FROM videos ORDER BY uri")


@pytest.mark.parametrize(("status", "code"), [(400, "ExpiredToken"), (403, "AccessDenied")])
def test_a_run_that_is_refused_ends_and_parks_no_video(tmp_path, bucket, model, status, code):
    bucket.refuse = lambda key: (status, code) if key else None
    report, rows = index(tmp_path, model)
    assert f"{NUM_VIDEOS} videos in a row were refused, and nothing is noted of them: " in report.stopped
    assert f"({code}: Said by {code})" in report.stopped
    assert rows == []
    assert (report.counts.failed, report.counts.not_attempted) == (0, NUM_VIDEOS)
    bucket.refuse = lambda _: None
    report, rows = index(tmp_path, model)
    assert (report.stopped, report.counts.indexed) == (None, NUM_VIDEOS)


def test_one_video_and_an_expired_key_are_the_runs_trouble_too(tmp_path, bucket, model):
    bucket.refuse = lambda key: (400, "ExpiredToken") if key else None
    report, rows = index(tmp_path, model, limit=1)
    assert report.stopped.startswith("a video was refused, and nothing is noted of it: ")
    assert rows == []


def test_what_is_forbidden_for_itself_is_its_own_failure(tmp_path, bucket, model):
    """Also where all of a folder is, and comes in a row; others can be read."""
    bucket.refuse = lambda key: (403, "AccessDenied") if key[-5:-4] in {"0", "1", "2", "3"} else None
    report, rows = index(tmp_path, model)
    assert (report.stopped, report.counts.failures) == (None, {"forbidden": 4})
    assert [row["status"] for row in rows] == ["failed"] * 4 + ["indexed"] * 2


def test_a_policy_that_slips_in_the_middle_ends_the_run_and_keeps_what_was_done(tmp_path, bucket, model):
    def refuse(key):
        read.update({key} if key.endswith(".mp4") else {})
        return (403, "AccessDenied") if len(read) > 2 else None

    read = set()
    bucket.refuse = refuse
    report, rows = index(tmp_path, model)
    assert "4 videos in a row were refused" in report.stopped
    assert [row["status"] for row in rows] == ["indexed"] * 2
    assert report.counts.not_attempted == NUM_VIDEOS - 2


def test_a_refusal_between_others_is_noted_and_tried_again_at_night(tmp_path, bucket, model):
    bucket.refuse = lambda key: (403, "RequestTimeTooSkewed") if key == "v/2.mp4" else None
    report, rows = index(tmp_path, model)
    assert (report.stopped, report.counts.failures) == (None, {"credentials": 1})
    report, rows = index(tmp_path, model, retry_failed=("credentials",))
    assert report.stopped is not None
    assert rows[2]["error_code"] == "credentials"
    bucket.refuse = lambda _: None
    report, rows = index(tmp_path, model, retry_failed=("credentials",))
    assert {row["status"] for row in rows} == {"indexed"}


def test_a_website_that_forbids_everything_forbids_each(tmp_path, bucket, model):
    """What its rights are is not known to be one thing; none of its videos is held back."""
    manifest = tmp_path / "list.csv"
    manifest.write_text("uri,size\n" + "".join(f"{bucket.url}/bucket/v/{i}.mp4,9\n" for i in range(4)))
    bucket.refuse = lambda _: (403, "AccessDenied")
    report = run_index(IndexOrder(Source(str(manifest)), str(tmp_path / "store"), model, "tiny"))
    assert (report.stopped, report.counts.failures) == (None, {"forbidden": 4})


@pytest.mark.usefixtures("no_keys")
@pytest.mark.parametrize("num_large", [1, 4])
def test_without_keys_a_run_in_keyframe_mode_ends_in_a_sentence(tmp_path, clips, model, num_large):
    """Large videos would be fetched as sparse copies: what cannot be signed is refused as a plain read is."""
    manifest, recipe = tmp_path / "videos.csv", tmp_path / "recipe.toml"
    large = "".join(f"s3://bucket/{i}.mp4,e{i},{9 << 20}\n" for i in range(num_large))
    manifest.write_text(f"uri,etag,size\n{clips / 'clip-00.mp4'},,\n{large}", encoding="utf-8")
    recipe.write_text('base = "tiny"\ndecode = "keyframe"\n', encoding="utf-8")
    report = run_index(IndexOrder(Source(str(manifest)), str(tmp_path / "store"), model, str(recipe)))
    number = "a video was" if num_large == 1 else f"{num_large} videos in a row were"
    assert report.stopped.startswith(f"{number} refused, and nothing is noted of ")
    assert "NoCredentialsError" in report.stopped
    assert (report.counts.indexed, report.counts.failed, report.counts.not_attempted) == (1, 0, num_large)
    (row,) = rows(tmp_path / "store", "SELECT status FROM videos")
    assert row["status"] == "indexed"
