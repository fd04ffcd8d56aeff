"""One Ray session for all tests of the jobs, and small things to index."""


import pytest


@pytest.fixture(scope="session", autouse=True)
def ray_session():
    import ray

    from jobs.session import connect

    connect("local")
    yield
    ray.shutdown()
