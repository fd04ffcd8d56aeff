"""What the tests share."""

import os
import signal
from pathlib import Path

import boto3
import pytest
import s3fs
from hypothesis import settings
from moto.server import ThreadedMotoServer

from support import GOLDENS, VIDEOS

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of two processes that spin for each other's cores are slow
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
# A shell that starts the tests in the background has them and their children ignore Ctrl-C, which some send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def goldens() -> Path:
    if not GOLDENS.is_dir():
        pytest.skip(f"no reference outputs in {GOLDENS}; set LONGVLM_GOLDENS")
    return GOLDENS


@pytest.fixture(scope="session")
def videos() -> Path:
    if not VIDEOS.is_dir():
        pytest.skip(f"no clips in {VIDEOS}; set LONGVLM_VIDEOS")
    return VIDEOS


@pytest.fixture(scope="session")
def s3_endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def s3_environment(s3_endpoint):
    """What leads a process to the S3 server on the loopback."""
    return {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "made-up",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def s3(s3_environment, monkeypatch):
    """A client of an S3 server on the loopback with an empty bucket named `bucket`; the environment leads there."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    s3fs.S3FileSystem.clear_instance_cache()
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for item in page.get("Contents", []):
            client.delete_object(Bucket="bucket", Key=item["Key"])
    client.delete_bucket(Bucket="bucket")
    s3fs.S3FileSystem.clear_instance_cache()
