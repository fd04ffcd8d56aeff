"""Fixtures of tests that run jobs: where these run, and small things to index. A room's conftest imports them.

With them what the nodes of a Ray publish of runs.
"""

import re
import shutil
import time
import urllib.request

import pytest

from clips import write_clip
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.jobs.cluster.logs import log
from longvlm.pipeline.models.longvlm.init import build_untrained
from models import save_clip_tower

# A Ray of a process's own as on a machine of one core: with a worker a stage, and none for each core that is here.
ONE_CORE = {"RAY_ADDRESS": "local", "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}
_LINE = re.compile(r"(?P<series>\w+)(\{(?P<tags>.*)\})? (?P<value>\S+)")


def scraped():
    """What Prometheus would read of this node: {(series, its own tags): value, summed over processes}."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for line in text.splitlines():
        if line.startswith("ray_longvlm_"):
            series, _, tags, value = _LINE.fullmatch(line).group("series", 2, "tags", "value")
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


@pytest.fixture(scope="module", autouse=True)
def in_process():
    """Jobs run in the process that asks for them, here or in a child, unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", IN_PROCESS)
        yield


@pytest.fixture
def driver(monkeypatch):
    """Gives a monkeypatch; what a driver's environment has it log is over afterwards."""
    kept, level = list(log.handlers), log.level
    yield monkeypatch
    log.handlers[:] = kept
    log.setLevel(level)


@pytest.fixture(params=["on_ray"])
def on_ray(ray_session, monkeypatch):  # noqa: ARG001 - it is open
    """Jobs run on a local Ray: of this process the one of all tests, of a child its own."""
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.fixture(scope="session")
def ray_session(s3_environment):
    """One for all tests.

    Its workers have the environment that it is started in, so they reach the S3 server too.
    """
    import ray

    from longvlm.jobs.cluster.session import connect

    with pytest.MonkeyPatch.context() as patch:
        # of two cores wherever it runs: a third decoder would show nothing more
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
        patch.setenv("RAY_metrics_report_interval_ms", "3000")  # not ten seconds, which a test would wait for
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        connect("local")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A LongVLM folder with random weights, its CLIP beside it."""
    folder = tmp_path_factory.mktemp("models") / "longvlm"
    save_clip_tower(folder / "tower")
    build_untrained(folder, tower="tower", tower_dim=64)
    return str(folder)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Twelve clips of one to four seconds."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(12):
        write_clip(folder / f"clip-{i:02}.mp4", 25 * (1 + i % 4))
    return folder


@pytest.fixture
def source(tmp_path, clips):
    """The clips, to be changed at the place where `indexed` knows them; afterwards they are as they were."""
    shutil.copytree(clips, tmp_path / "kept")
    yield clips
    shutil.rmtree(clips)
    shutil.copytree(tmp_path / "kept", clips)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory, clips, model):
    """A store that holds all clips under the recipe tiny. Tests that write to it take a copy."""
    from longvlm.jobs.index.order import IndexOrder
    from longvlm.jobs.index.run import run_index
    from longvlm.pipeline.source.corpus import Source

    store = tmp_path_factory.mktemp("stores") / "indexed"
    order = IndexOrder(Source(str(clips)), str(store), model=model, recipe="tiny", ray_address=IN_PROCESS)
    report = run_index(order)
    assert report.counts.indexed == 12
    return str(store)
