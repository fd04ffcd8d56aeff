"""A bucket of videos becomes a store in a bucket, by the commands that a user types."""

import json

import pytest
from click.testing import CliRunner
from journey import grown, scraped

from longvlm.jobs.cli import main


def longvlm(*args):
    done = CliRunner().invoke(main, [*map(str, args), "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


# What the first run counts at least, as its nodes publish it: a series and its own tags.
COUNTED = {
    ("ray_longvlm_work_total", "encode"): 5.0,
    ("ray_longvlm_work_total", "decode"): 5.0,
    ("ray_longvlm_units_total", "not_a_video"): 1.0,
    ("ray_longvlm_units_total", ""): 4.0,
    ("ray_longvlm_videos_total", "", "indexed"): 4.0,
    ("ray_longvlm_videos_total", "not_a_video", "failed"): 1.0,
    ("ray_longvlm_commits_total", "index"): 1.0,
    ("ray_longvlm_commit_seconds_count", "index"): 1.0,
}


@pytest.mark.usefixtures("on_ray")
def test_the_journey_from_bucket_to_bucket(s3, clips, model):
    """Watched and counted, answered, found unchanged; a moved object takes its tokens and answers along."""
    published = scraped()
    for i in range(4):
        s3.upload_file(str(clips / f"clip-{i:02}.mp4"), "bucket", f"videos/{i % 2}/clip-{i}.mp4")
    s3.put_object(Bucket="bucket", Key="videos/bad.mp4", Body=b"not a video" * 100)
    store = ("--store", "s3://bucket/deep/index")
    (last,) = longvlm("index", "s3://bucket/videos", *store, "--model", model, "--recipe", "tiny")
    assert (last["listed"], last["indexed"], last["failures"]) == (5, 4, {"not_a_video": 1})
    found, growth = grown(published, COUNTED)
    assert {key: growth.get(key, 0.0) >= value for key, value in COUNTED.items()} == dict.fromkeys(COUNTED, True)
    for series in ("busy_seconds_total", "cpu_seconds_total", "work_seconds_sum"):
        assert growth[f"ray_longvlm_{series}", "decode"] > 0
    assert growth["ray_longvlm_frames_total",] > 0
    assert growth["ray_longvlm_video_seconds_total",] >= last["video_seconds"] - 1e-6
    assert all(growth["ray_longvlm_written_bytes_total", table] > 0 for table in ("tokens", "segments"))
    assert found["ray_longvlm_queue", "index"] == 0
    *answers, counts = longvlm("answer", *store, "--ask", "What is red?", "--max-new-tokens", 3)
    assert counts["answered"] == len(answers) == 4
    assert min(counts[name] for name in ("prefill_tokens", "prefill_s", "decode_tokens", "decode_s", "workers")) > 0
    (again,) = longvlm("index", "s3://bucket/videos", *store)
    assert (again["unchanged"], again["known_failed"], again["not_attempted"]) == (4, 1, 0)
    sql = """
        SELECT uri, write_id, answer, etag, (SELECT count(*) FROM segments s WHERE s.write_id = a.write_id) AS segments
        FROM answers a JOIN videos USING (uri, write_id) ORDER BY write_id
    """
    before = longvlm("sql", *store, sql)
    assert {row["uri"] for row in before} == {f"s3://bucket/videos/{i % 2}/clip-{i}.mp4" for i in range(4)}
    assert all(row["etag"] and row["segments"] for row in before)
    s3.copy_object(Bucket="bucket", Key="videos/archive/0.mp4", CopySource="bucket/videos/0/clip-0.mp4")
    s3.delete_object(Bucket="bucket", Key="videos/0/clip-0.mp4")
    (moved,) = longvlm("index", "s3://bucket/videos", *store)
    assert (moved["moved"], moved["unchanged"], moved["indexed"], moved["gone"]) == (1, 3, 0, 0)
    after = longvlm("sql", *store, sql)
    assert [row["write_id"] for row in after] == [row["write_id"] for row in before]
    names = ("archive/0", "0/clip-2", "1/clip-1", "1/clip-3")
    assert {row["uri"] for row in after} == {f"s3://bucket/videos/{name}.mp4" for name in names}
    assert [row["segments"] for row in after] == [row["segments"] for row in before]
    *_, counts = longvlm("answer", *store, "--ask", "What is red?", "--max-new-tokens", 3)
    assert (counts["asked"], counts["reused"]) == (4, 4)
