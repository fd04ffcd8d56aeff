"""The gauntlet's own eyes, and one of its faults on a small corpus; all of them: python -m benchmarks.faults."""

import random
from pathlib import Path

import pytest
import stores

from benchmarks.faults.checks import inspect
from benchmarks.faults.gauntlet import Fault, endure
from benchmarks.faults.processes import driver_killed_between_commits
from benchmarks.faults.world import make_world
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.store.ledger import Store


@pytest.fixture
def store(tmp_path):
    """Two live videos and a failed one."""
    made = Store.create(str(tmp_path / "store"))
    made.register_recipe(stores.LONG, "made-up")
    stores.index(made, ["a", "b"])
    return made


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


def test_a_damaged_shard_is_broken(store):
    for shard in Path(store.uri, "tokens").glob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-20] + bytes(20))
    assert inspect(store.uri, {}).broken


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cluster of its own for the drivers, and twelve videos of which one is bad."""
    made = make_world(tmp_path_factory.mktemp("world") / "world", 12, random.Random(0))
    yield made
    made.head.stop()


def test_a_run_survives(world, tmp_path):
    """It is killed on a cluster, whose workers end with it, and goes on without one."""

    def inflict(trial):
        ended = driver_killed_between_commits(trial)
        trial.env = {"RAY_ADDRESS": IN_PROCESS}
        return ended

    trial = endure(world, Fault(inflict), tmp_path / "trial")
    assert trial.survived, (trial.broken, trial.lost, trial.doubled)
    assert trial.second_pass_right
    assert len(trial.live) == 11
