import socket
import subprocess
import sys

import pytest

from longvlm.jobs.cluster import session
from longvlm.jobs.cluster.executor import IN_PROCESS
from longvlm.schemas.errors import InputError


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


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_job_that_needs_ray_says_so_where_there_is_to_be_none(monkeypatch, way):
    monkeypatch.setenv("RAY_ADDRESS", IN_PROCESS if way == "environment" else "local")
    with pytest.raises(InputError, match="this job needs Ray"):
        session.connect(IN_PROCESS if way == "option" else None)
