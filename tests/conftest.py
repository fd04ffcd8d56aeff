"""What the tests share."""

import gc
import os
import re
import signal
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from threading import Lock, Thread

import pytest
from hypothesis import settings

from longvlm.jobs.cluster.resources import COLLECT_EVERY
from support import VIDEOS, largest_error, missing

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of processes that spin for each other's cores are slow
# Tests share the cores with each other and with Ray's workers. These are not to come last, as Ray has it for the sake
# of the desktop that it may run on, and threads that wait are to sleep.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # no workers that nobody has asked for yet
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
gc.disable()  # until all are collected: none of it is garbage, and to look at it again and again took a fifth of that
# A shell that starts the tests in the background has them and their children ignore Ctrl-C, which some send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="what tests marked device run on")


def pytest_configure(config):
    if config.getoption("--device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no such device here")


def pytest_itemcollected(item):
    """What takes the device, itself or through another fixture, is marked so."""
    if "device" in getattr(item, "fixturenames", ()):
        item.add_marker("device")


PAGES = "tests/jobs/serve/"


def pytest_collection_modifyitems(items):
    """Tests of Ray come first, for they take longest, then those of the whole; many quick files even out the end."""
    items.sort(key=lambda item: (not is_on_ray(item.nodeid), item.nodeid.partition("::")[0].count("/") > 1))


def pytest_collection_finish():
    """What was loaded stays to the end, and is not looked at any more; else as in commands."""
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests of Ray share a session and those of pages a server: one process has all; others stay with their file."""
    from xdist.scheduler import LoadFileScheduling

    class RayTogether(LoadFileScheduling):
        def _split_scope(self, nodeid):
            if is_on_ray(nodeid):
                return "on_ray"
            return PAGES if nodeid.startswith(PAGES) else super()._split_scope(nodeid)

    return RayTogether(config, log)


def is_on_ray(nodeid):
    """Whether a test has one of the fixtures that open Ray; these leave their mark in its name."""
    return "on_ray" in nodeid.partition("[")[2]


def pytest_runtest_setup(item):
    if marker := item.get_closest_marker("missing"):
        missing(*marker.args)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """The tests' Ray ends with the last test of it: idle, its processes take a tenth of a core to the end."""
    if is_on_ray(item.nodeid) and not (nextitem and is_on_ray(nextitem.nodeid)):
        import ray

        ray.shutdown()


def pytest_ignore_collect(collection_path, config):
    """`-m device` imports only files with such tests: where it runs, libraries that others need may be missing."""
    if config.getoption("-m") != "device":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    takes_device = re.compile(r"^def \w+\(.*\bdevice\b", re.MULTILINE)
    return not any(takes_device.search(path.read_text(encoding="utf-8")) for path in files) or None


@pytest.fixture(scope="session")
def device(request):
    """What --device names. A GPU computes in full float32 then: TF32 would hide mistakes smaller than a thousandth."""
    import torch

    found = torch.device(request.config.getoption("--device"))
    if found.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return found


@pytest.fixture
def agree(request, record_property):
    """Holds what a device made to what it should be, and notes the test's largest error in its report."""
    import torch

    def agree(found, wanted, atol, rtol=0.0):
        dtype = torch.float64 if isinstance(found, float) else None
        found, wanted = (torch.as_tensor(values, dtype=dtype).detach().cpu() for values in (found, wanted))
        noted = request.node.user_properties
        before = [value for name, value in noted if name == "max_error"]
        noted[:] = [item for item in noted if item[0] != "max_error"]
        record_property("max_error", max([largest_error(found, wanted), *before]))
        torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol)

    return agree


@pytest.fixture(scope="session")
def videos() -> Path:
    if not VIDEOS.is_dir():
        missing(VIDEOS, "clips")
    return VIDEOS


@pytest.fixture(scope="session")
def s3_endpoint():
    """An S3 server: moto's for this service alone, which need not look up what service each request is for."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        """Werkzeug's ends each connection, a hundredth of a second after its one answer; this one's stay open."""

        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def run_wsgi(self):
            environ, started = self.make_environ(), []
            asked = environ["wsgi.input"]
            is_chunked = "wsgi.input_terminated" in environ
            content = asked.read() if is_chunked else asked.read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = BytesIO(content)  # read to its end, behind which the next request begins
            body = b"".join(self.server.app(environ, lambda status, headers: started.append((status, headers))))
            ((status, headers),) = started
            self.send_response(int(status.partition(" ")[0]), status.partition(" ")[2])
            names = {name.lower() for name, _ in headers}
            for name, value in headers if "content-length" in names else [*headers, ("Content-Length", len(body))]:
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, *_):
            pass

    app, turn = create_backend_app("s3"), Lock()

    def atomic(environ, start_response):
        """S3 looks at a condition and writes in one step, moto in two, between which another thread may come."""
        is_conditional = "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ
        with turn if is_conditional and environ["REQUEST_METHOD"] == "PUT" else nullcontext():
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def empty_s3(s3_endpoint):  # noqa: ARG001 - it is what is emptied
    """Gives a function that takes every bucket off the S3 server: whatever a test left there, the next starts bare.

    Clients of this server are kept, without what they know of it: a new one takes a fifth of a second to make.
    """
    import s3fs
    from moto.s3.models import s3_backends

    def empty():
        s3_backends.reset()
        for client in s3fs.S3FileSystem._cache.values():
            client.invalidate_cache()

    return empty


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint):
    """What leads a process to the S3 server on the loopback."""
    return {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture(scope="session")
def s3_client(s3_environment):
    """A client of the S3 server on the loopback: to make one takes as long as a few requests, and a connection."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment.items():
            patch.setenv(name, value)
        return boto3.client("s3")


@pytest.fixture
def s3(s3_client, s3_environment, empty_s3, monkeypatch):
    """A client of an S3 server on the loopback with an empty bucket named `bucket`; the environment leads there."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    empty_s3()
    s3_client.create_bucket(Bucket="bucket")
    yield s3_client
    empty_s3()


@pytest.fixture
def no_keys(s3, tmp_path, monkeypatch):  # noqa: ARG001 - what is asked all the same is asked there
    """Nobody has keys for the S3 server on the loopback, neither in the environment nor in a file."""
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3fs.S3FileSystem, "cachable", False)  # clients that know keys from before
