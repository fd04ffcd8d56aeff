import pytest

from longvlm.jobs.cluster import retry
from longvlm.jobs.cluster.commits import Commits


@pytest.fixture
def made():
    """Makes commits that note what they put into the store."""
    kept = []

    def make(store="/store", **settings):
        return Commits(store, "index", "run", lambda parts: kept.append(list(parts)), **settings), kept

    return make


def test_what_comes_in_is_committed_when_it_is_much_and_at_the_end(made):
    commits, kept = made(most_rows=5, every_s=3600.0)
    assert commits.add("a", 2) == commits.add("b", 2) == []
    assert commits.num_rows == 4
    assert commits.add("c", 1) == ["a", "b", "c"]
    assert commits.add("d", 0) == []
    assert commits.flush() == ["d"]
    assert kept == [["a", "b", "c"], ["d"]]
    assert (commits.num_rows, commits.flush(), len(kept)) == (0, [], 2)


def test_what_waits_too_long_is_committed_with_the_next_part(made):
    commits, kept = made(every_s=3600.0)
    assert commits.add("a", 10**9) == []
    commits.last_s -= 3601
    assert commits.add("b", 1) == ["a", "b"]
    assert commits.add("c", 1) == []
    assert kept == [["a", "b"]]


def test_a_remote_store_that_is_out_of_reach_is_tried_again_with_the_same_parts(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE_S", 0.01)
    tries = []

    def commit(parts):
        tries.append(list(parts))
        if len(tries) < 3:
            raise ConnectionError("no route")

    commits = Commits("s3://bucket/store", "index", "run", commit)
    commits.add("a", 1)
    assert commits.flush() == ["a"]
    assert tries == [["a"]] * 3
