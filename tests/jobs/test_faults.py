"""The gauntlet's own eyes, and one of its faults on a small corpus; all of them: python -m benchmarks.faults."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3fs
import stores

from benchmarks.faults import clock, rot
from benchmarks.faults.bucket import NAME, FaultyBucket
from benchmarks.faults.checks import inspect
from benchmarks.faults.gauntlet import Fault, endure
from benchmarks.faults.processes import driver_killed_between_commits
from benchmarks.faults.storage import TOLD_SHORT
from benchmarks.faults.trial import SkippedError
from benchmarks.faults.world import make_world
from longvlm.pipeline.source import copies
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import ErrorCode, TransientError


@pytest.fixture(scope="module")
def two_videos(tmp_path_factory):
    """A store of two live videos, to be copied."""
    made = Store.create(str(tmp_path_factory.mktemp("made") / "store"))
    made.register_recipe(stores.LONG, "made-up")
    stores.index(made, ["a", "b"])
    return made.uri


@pytest.fixture
def store(tmp_path, two_videos):
    return Store.open(shutil.copytree(two_videos, str(tmp_path / "store")))


def test_what_is_whole_is_found_whole(store):
    found = inspect(store.uri, {"a.mp4": 400, "b.mp4": 400})
    assert {*found.live} == {"a.mp4", "b.mp4"}
    assert not found.lost + found.doubled + found.broken
    assert not inspect(f"{store.uri}-not-made-yet", {}).live


def test_other_content_than_the_file_has_is_seen(store):
    (broken,) = inspect(store.uri, {"a.mp4": 400, "b.mp4": 399}).broken
    assert "b.mp4 has 400 frames" in broken


def test_rows_without_tokens_are_lost(store):
    made = stores.encoded(["c"])
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    without = outcomes.set_column(
        outcomes.schema.get_field_index("tokens_shard"),
        "tokens_shard",
        [[None] * len(outcomes)],
    ).cast(outcomes.schema)
    store.commit(without, stores.videos(outcomes, ["c"], stores.LONG.fingerprint))
    found = inspect(store.uri, {})
    assert found.lost == ["tokens of c.mp4", "c.mp4"]


def test_a_write_that_is_live_twice_is_doubled(store):
    made = stores.encoded(["c"])
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["c"], stores.LONG.fingerprint))
    store.append("videos", stores.videos(outcomes, ["c"], stores.LONG.fingerprint, video_id="another"))
    doubled = inspect(store.uri, {}).doubled
    assert made["write_id"][0].as_py() in doubled


@pytest.mark.parametrize("table", ["tokens", "segments", "videos"])
def test_a_rotten_footer_is_broken(store, table):
    (path,) = Path(store.uri, table).glob("*.parquet")
    rot.flip(path, rot.footer_start(path))
    assert path.name in str(inspect(store.uri, {}).broken)
    rot.flip(path, rot.footer_start(path))
    assert not inspect(store.uri, {}).broken


def test_other_tokens_have_another_digest(store):
    before = inspect(store.uri, {}).tokens
    stores.index(store, ["a"], seed=1)
    after = inspect(store.uri, {}).tokens
    assert {name for name in before if before[name] != after[name]} == {"a.mp4"}


@pytest.fixture
def bucket(monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION", "DEFAULT_REGION"):
            patch.setenv(f"AWS_{name}", "of the test before")  # which is what it is afterwards
        with FaultyBucket(random.Random(0)) as made:
            yield made
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_body_that_ends_early_is_tried_again_and_never_taken_for_a_whole_one(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_BACKOFF_S", 0.0)
    content = random.Random(1).randbytes(5000)
    bucket.client.put_object(Bucket=NAME, Key="a.mp4", Body=content)
    bucket.short = 0.8
    errors = []
    for _ in range(8):
        try:
            with copies.local_copy(f"s3://{NAME}/a.mp4", str(tmp_path), len(content)) as path:
                assert Path(path).read_bytes() == content
        except TransientError as error:
            errors.append(error)
    assert 0 < len(errors) < 8 < bucket.num_hurt
    assert {error.code for error in errors} == {ErrorCode.NETWORK}
    assert all(TOLD_SHORT.search(str(error)) for error in errors)
    assert not [*tmp_path.iterdir()]


def test_a_process_whose_clock_is_ahead_measures_durations_as_others_do():
    try:
        env = clock.ahead(365)
    except SkippedError as reason:
        pytest.skip(str(reason))
    code = "import time; began = time.monotonic(); time.sleep(0.1); print(time.time(), time.monotonic() - began)"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    now_s, slept_s = map(float, found.stdout.split())
    assert 364 < (now_s - time.time()) / 86400 < 366
    assert slept_s >= 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve videos of which one is bad. Drivers have no cluster: what becomes of workers is Ray's to tell."""
    return make_world(tmp_path_factory.mktemp("world") / "world", 12, random.Random(0), num_cpus=0)


def test_a_run_survives(world, tmp_path):
    trial = endure(world, Fault(driver_killed_between_commits), tmp_path / "trial")
    assert trial.survived, (trial.broken, trial.lost, trial.doubled)
    assert trial.second_pass_right
    assert len(trial.live) == 11
