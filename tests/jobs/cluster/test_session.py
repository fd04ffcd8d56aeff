import os
import re
import socket
import subprocess
import sys

import pytest
import ray

from longvlm.jobs.cluster import session
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.schemas.errors import InputError


@pytest.fixture
def no_session(monkeypatch):
    """As in a process that has no Ray yet."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


def test_an_address_where_nobody_listens_is_a_sentence_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*free.getsockname())
    code = f"from longvlm.jobs.cluster.session import connect; connect({address!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert f"InputError: no Ray cluster answers at {address}" in done.stderr
    with pytest.raises(OSError, match="refused"):
        session._knock(f"ray://{address}")


@pytest.mark.parametrize("address", ["auto", "ray-head"])
def test_names_without_a_port_are_left_to_ray(address):
    session._knock(address)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("way", ["option", "environment"])
@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:8265", "is a dashboard's address"),
        ("bogus://head:1", "is no address of Ray's; write HEAD:6379"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("127.0.0.1:99999", "no Ray cluster answers at 127.0.0.1:99999"),
        ("a..b:6379", "no Ray cluster answers at a..b:6379"),
    ],
)
def test_an_address_that_cannot_be_joined_is_a_sentence_that_names_where_it_came_from(monkeypatch, way, address, says):
    monkeypatch.setenv("RAY_ADDRESS", address if way == "environment" else "local")
    with pytest.raises(InputError) as caught:
        session.connect(address if way == "option" else None)
    said = str(caught.value)
    assert says in said
    assert len(said.splitlines()) == 1
    assert ("--ray-address" in said, "RAY_ADDRESS" in said) == (way == "option", way == "environment")


TIMED_OUT = "The current node timed out during startup"


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Could not find any running Ray instance. Please specify"), "Could not find any running Ray"),
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.9.3\n    Python: 3.10.1\nThis process"
            ),
            "has Ray: 2.9.3 and Python: 3.10.1, and here are Ray: ",
        ),
        (ray.exceptions.AuthenticationError("Invalid token"), "RAY_AUTH_TOKEN"),
        (
            Exception("The current node timed out during startup. This could"),
            "The current node timed out during startup",
        ),
    ],
)
@pytest.mark.parametrize("address", ["auto", "head"])
def test_what_ray_raises_as_it_joins_is_a_sentence(monkeypatch, error, says, address):
    def refuse(**_):
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        session.connect(None)
    assert len(str(caught.value).splitlines()) == 1
    assert "--ray-address" not in str(caught.value)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "/tmp/ray"), "No space left on device (/tmp/ray): free some space"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (
            Exception("The current node timed out during startup. This could"),
            "The current node timed out during startup; is",
        ),
    ],
)
def test_a_local_ray_that_does_not_start_says_why(monkeypatch, error, says):
    def fail(**_):
        raise error

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(InputError) as caught:
        session.connect("local")
    assert str(caught.value).startswith("Ray did not start on this machine: ")
    assert says in str(caught.value)
    assert "--ray-address" not in str(caught.value)


@pytest.mark.parametrize("deep", [1, 11])
def test_rays_sockets_have_paths_that_fit(monkeypatch, tmp_path, deep):
    wanted = tmp_path.joinpath(*["ten-bytes-"] * deep)
    wanted.mkdir(parents=True)
    monkeypatch.setenv("RAY_TMPDIR", str(wanted))
    folder = session._folder_for_ray()
    assert len(f"{folder}{session._SOCKET}") <= 107
    assert folder == "/tmp/ray" or deep == 1


def test_no_folder_for_rays_sockets_is_a_sentence(monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(InputError, match="set RAY_TMPDIR to one"):
        session._folder_for_ray()


@pytest.mark.parametrize("home", ["empty", "missing", "with a token"])
def test_a_local_ray_needs_no_home(monkeypatch, tmp_path, home):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    if home == "with a token":
        (tmp_path / home / ".ray").mkdir(parents=True)
        (tmp_path / home / ".ray" / "auth_token").write_text("f" * 64)
    session._bring_token()
    assert ("RAY_AUTH_TOKEN" in os.environ) == (home != "with a token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_job_that_needs_ray_says_so_where_there_is_to_be_none(monkeypatch, way):
    monkeypatch.setenv("RAY_ADDRESS", IN_PROCESS if way == "environment" else "local")
    with pytest.raises(InputError, match="this job needs Ray"):
        session.connect(IN_PROCESS if way == "option" else None)
