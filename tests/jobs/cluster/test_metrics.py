"""What is counted; what a run's nodes then publish is held by its journey, tests/jobs/index/test_s3.py."""

import re

import pyarrow as pa
import pytest
import ray

from longvlm.jobs.cluster import metrics
from longvlm.jobs.cluster.tally import Tally
from longvlm.schemas import tables


def test_every_name_is_documented_and_says_what_it_is():
    names = [metric.name for metric in metrics.ALL]
    assert len(set(names)) == len(names) == 14
    for metric in metrics.ALL:
        assert metric.meaning.endswith(".")
        assert re.fullmatch(r"longvlm_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total")  # Ray adds it
    assert metrics.WORK.series == ("ray_longvlm_work_total",)
    assert metrics.QUEUE.series == ("ray_longvlm_queue",)


@pytest.mark.usefixtures("on_ray")
def test_an_unfinished_commit_is_not_counted():
    def nothing(*_):
        raise AssertionError("counted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_recorder", lambda _: nothing)
        with pytest.raises(OSError, match="disk"), metrics.timed_commit("index"):
            raise OSError("disk")
        metrics.UNITS.record(0, code="")  # nothing to add


@pytest.mark.usefixtures("on_ray")
def test_shards_are_counted_once_however_many_units_name_them(monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "_recorder", lambda metric: lambda value, tags: seen.append((metric, value, tags)))
    shard = {"path": "a.parquet", "size_bytes": 7, "stats": "{}"}
    outcomes = pa.Table.from_pylist([{"tokens_shard": shard}, {"tokens_shard": shard}, {}], tables.OUTCOMES)
    metrics.count_written(outcomes)
    assert [(value, tags) for metric, value, tags in seen if metric is metrics.WRITTEN_BYTES] == [
        (7, {"table": "tokens"})
    ]


def test_nothing_is_counted_where_there_is_no_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_recorder", None)  # it would be called
    Tally().finish("decode", ["a"], worker="w", busy_s=1.0, cpu_s=1.0)
