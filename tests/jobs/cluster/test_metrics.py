import re
import shutil
import time
import urllib.request

import pyarrow as pa
import pytest
import ray

from longvlm.jobs.cluster import metrics
from longvlm.jobs.cluster.tally import Tally
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.pipeline.source.corpus import Source
from longvlm.schemas import tables

LINE = re.compile(r"(?P<series>\w+)(\{(?P<tags>.*)\})? (?P<value>\S+)")


def scraped():
    """What Prometheus would read of this node: {(series, its own tags): value, summed over processes}."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_longvlm_"):
            series, _, tags, value = LINE.fullmatch(line).group("series", 2, "tags", "value")
            own = {
                k: v for k, v in re.findall(r'(\w+)="(.*?)"', tags) if k in ("stage", "status", "code", "table", "job")
            }
            key = (series, *(v for _, v in sorted(own.items())))
            found[key] = found.get(key, 0.0) + float(value)
    return found


def grown(before, least, within_s=300):
    """What is published once the figures in `least` grew by that much, or when the time is over.

    Ray's processes report every ten seconds, so that what earlier tests did may come in late and add to it.
    """
    deadline = time.monotonic() + within_s
    while True:
        found = scraped()
        growth = {key: value - before.get(key, 0.0) for key, value in found.items()}
        if all(growth.get(key, 0.0) >= value for key, value in least.items()) or time.monotonic() > deadline:
            return found, growth
        time.sleep(1)


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


@pytest.mark.usefixtures("on_ray")
def test_what_a_run_did_can_be_read_from_its_nodes(tmp_path, clips, model):
    before = scraped()
    source = tmp_path / "videos"
    source.mkdir()
    for name in ("clip-00.mp4", "clip-01.mp4"):
        shutil.copy(clips / name, source)
    (source / "empty.mp4").touch()
    report = run_index(IndexOrder(Source(str(source)), str(tmp_path / "store"), model=model, recipe="tiny"))
    assert (report.counts.indexed, report.counts.failed) == (2, 1)
    told = {("ray_longvlm_work_total", "encode"): 3.0, ("ray_longvlm_work_total", "decode"): 3.0}
    told |= {("ray_longvlm_units_total", "empty_file"): 1.0, ("ray_longvlm_units_total", ""): 2.0}
    told |= {("ray_longvlm_videos_total", "", "indexed"): 2.0}
    told |= {("ray_longvlm_videos_total", "empty_file", "failed"): 1.0}
    told |= {("ray_longvlm_commits_total", "index"): 1.0, ("ray_longvlm_commit_seconds_count", "index"): 1.0}
    found, growth = grown(before, told)
    assert {key: growth.get(key, 0.0) >= value for key, value in told.items()} == dict.fromkeys(told, True)
    for series in ("busy_seconds_total", "cpu_seconds_total", "work_seconds_sum"):
        assert growth[f"ray_longvlm_{series}", "decode"] > 0
    assert growth["ray_longvlm_frames_total",] > 0
    assert growth["ray_longvlm_video_seconds_total",] >= report.counts.video_seconds - 1e-6
    assert all(growth["ray_longvlm_written_bytes_total", table] > 0 for table in ("tokens", "segments"))
    assert found["ray_longvlm_queue", "index"] == 0


def test_nothing_is_counted_where_there_is_no_ray(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "_recorder", None)  # it would be called
    Tally().finish("decode", ["a"], worker="w", busy_s=1.0, cpu_s=1.0)
