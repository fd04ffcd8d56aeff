"""Fixtures of tests that run jobs: where these run, and small things to index. A room's conftest imports them."""

import shutil

import pytest

from clips import write_clip
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.pipeline.models.longvlm.init import build_untrained
from models import save_clip_tower


@pytest.fixture(scope="module", autouse=True)
def in_process():
    """Jobs run in the process that asks for them, here or in a child, unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", IN_PROCESS)
        yield


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
