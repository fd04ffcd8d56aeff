import errno

import pytest
from deltalake.exceptions import DeltaError

from longvlm.jobs.cluster import retry
from longvlm.jobs.cluster.retry import persist


class Store:
    """Fails with each of some errors, then succeeds."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def write(self, name):
        if self.errors:
            raise self.errors.pop(0)
        return f"wrote {name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)


def test_what_passes_is_waited_for(caplog):
    store = Store(ConnectionResetError("reset"), DeltaError("Generic S3 error"), TimeoutError("slow"))
    assert persist("s3://bucket/store", store.write, "x") == "wrote x"
    assert "the store is out of reach (ConnectionResetError: reset)" in caplog.text


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), PermissionError("no"), ValueError("wrong"), OSError(errno.EROFS, "read-only")],
)
def test_what_no_waiting_cures_is_told_at_once(error):
    store = Store(error, error)
    with pytest.raises(type(error)):
        persist("s3://bucket/store", store.write, "x")
    assert len(store.errors) == 1


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(retry, "STORE_PATIENCE_S", 0.05)
    with pytest.raises(ConnectionError):
        persist("s3://bucket/store", Store(*[ConnectionError("gone")] * 100).write, "x")


def test_a_local_disk_is_not_waited_for():
    store = Store(DeltaError("No space left on device (os error 28)"))
    with pytest.raises(DeltaError):
        persist("/mnt/store", store.write, "x")
