"""Whose rows an erasure takes: never those of another video under a name that one of them once had."""

import contextlib
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from stores import rows

from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep import erase
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.identity import video_id

CAM, MONDAY = (video_id(stores.uri_of(name)) for name in ("cam", "monday"))


def blobs(made):
    return [segment["local"] for video in made.to_pylist() for segment in video["segments"]]


def left_of(store, words):
    """Which of some bytes are anywhere in the files of the tables."""
    held = b"".join(path.read_bytes() for path in sorted(Path(store.uri).rglob("*.parquet")))
    return [word for word in words if word in held]


def is_whole(store, *names):
    """Whether these videos, and no others, are live with all that was written of them."""
    live = rows(store, "FROM live_videos")
    found = verify(store.pin())
    assert (found.damaged_files, found.problems) == ({}, [])
    is_read = read_tokens(store.pin(), [row["write_id"] for row in live]).num_rows == 4 * len(names)
    return {Path(row["uri"]).stem for row in live} == {*names} and is_read


@pytest.fixture(scope="module")
def moved_once(tmp_path_factory, empty_store):
    """Where a store lies in which the camera's video was moved to monday, and what was encoded, superseded too."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("moved") / "store")))
    superseded = stores.index(store, ["cam"], seed=7)
    made = stores.index(store, ["cam"])
    stores.move(store, "cam", "monday")
    return store.uri, [b"/videos/monday.mp4", *blobs(made), *blobs(superseded)]


@pytest.fixture
def moved(tmp_path, moved_once):
    """A copy of it, and these bytes."""
    uri, words = moved_once
    return Store.open(str(shutil.copytree(uri, tmp_path / "store"))), words


@contextlib.contextmanager
def meanwhile(monkeypatch, name, act):
    """Something that happens once, when an erasure first comes to a function of its module."""
    plain, left = getattr(erase, name), [act]

    def interrupted(*args, **options):
        if left:
            left.pop()()
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(erase, name, interrupted)
        yield
    assert not left


@pytest.mark.parametrize("step", ["files_on_disk", "rewrite", "unreferenced", "delete_old_versions"])
def test_a_video_that_appears_under_an_old_name_meanwhile_stays(moved, monkeypatch, step):
    store, words = moved
    other = Store.open(store.uri)
    with meanwhile(monkeypatch, step, lambda: stores.index(other, ["cam"], seed=1, etag="2")):
        erased = erase.erase(store, [MONDAY], "run")
    assert erased.still_there == []
    assert is_whole(store, "cam")
    assert left_of(store, words) == []
    assert erase.left_over(store, 48) == []


def test_one_that_is_being_indexed_under_an_old_name_is_refused_and_watched_again(moved, monkeypatch):
    """Its shards are named, and nothing says yet what they hold: it could be what is to be forgotten."""
    store, words = moved
    other = Store.open(store.uri)
    outcomes = write_shards(store.uri, stores.encoded(["cam"], seed=1), stores.LONG.fingerprint)
    other.commit(outcomes, tables.VIDEOS.empty_table())
    late = []
    video = stores.videos(outcomes, ["cam"], stores.LONG.fingerprint, etag="2")
    with meanwhile(monkeypatch, "rewrite", lambda: late.extend(other.commit(outcomes.slice(0, 0), video))):
        assert erase.erase(store, [MONDAY], "run").still_there == []
    assert late == outcomes["write_id"].to_pylist()
    assert left_of(store, words) == []
    stores.index(other, ["cam"], seed=1, etag="2")
    assert is_whole(store, "cam")


def test_what_a_killed_run_named_under_an_old_name_goes(moved):
    store, words = moved
    abandoned = stores.encoded(["cam"], seed=3)
    store.commit(write_shards(store.uri, abandoned, stores.LONG.fingerprint), tables.VIDEOS.empty_table())
    stores.index(store, ["cam"], seed=1, etag="2")
    foreseen = erase.foresee(store, [MONDAY])
    erased = erase.erase(store, [MONDAY], "run")
    assert foreseen.uris == [stores.uri_of("monday")]
    assert foreseen.rows == erased.rows == {"tokens": 12, "segments": 12, "verdicts": 0, "answers": 0, "videos": 3}
    assert left_of(store, [*words, *blobs(abandoned)]) == []
    assert is_whole(store, "cam")


def test_a_name_that_it_is_moved_to_while_it_is_hidden_is_kept_out_too(moved, monkeypatch):
    store, words = moved
    with meanwhile(monkeypatch, "copy_tombstones", lambda: stores.move(Store.open(store.uri), "monday", "tuesday")):
        assert erase.erase(store, [MONDAY], "run").still_there == []
    assert is_whole(store)
    assert left_of(store, [*words, b"/videos/tuesday.mp4"]) == []
    assert video_id(stores.uri_of("tuesday")) in store.forgotten()


class CutOffError(Exception):
    """An erasure is killed."""


def cut_off():
    raise CutOffError


@pytest.mark.parametrize("step", ["copy_tombstones", "rewrite", "delete_old_versions"])
def test_an_erasure_that_was_cut_off_is_finished_though_another_video_is_under_the_old_name_by_then(
    moved, monkeypatch, step
):
    store, words = moved
    with meanwhile(monkeypatch, step, cut_off), pytest.raises(CutOffError):
        erase.erase(store, [MONDAY], "run")
    stores.index(store, ["cam"], seed=1, etag="2")
    asked = erase.left_over(store, 48) or [MONDAY]  # nothing was hidden yet
    assert asked == [MONDAY]
    assert erase.erase(Store.open(store.uri), asked, "run").still_there == []
    assert is_whole(store, "cam")
    assert left_of(store, words) == []


def test_the_ledger_keeps_its_rows_until_nothing_is_left_of_the_others(moved, monkeypatch):
    """Only by these is it known that what was written under the old name is to go."""
    store, words = moved
    (file,) = (Path(file.uri) for file in store.pin().table("tokens").files if words[1] in Path(file.uri).read_bytes())
    shutil.copy(file, file.with_name("unnamed.14.parquet"))
    with monkeypatch.context() as patch:
        patch.setattr(erase, "remove_files", lambda *_: [])
        assert erase.erase(store, [MONDAY], "run").still_there
    stores.index(store, ["cam"], seed=1, etag="2")
    assert erase.left_over(store, 48) == [MONDAY]
    assert erase.erase(store, [MONDAY], "run").still_there == []
    assert left_of(store, words) == []
    assert is_whole(store, "cam")


def test_an_erasure_that_sleeps_leaves_what_is_indexed_once_another_proved_and_lifted_it(moved, monkeypatch):
    store, words = moved
    other = Store.open(store.uri)

    def lift():
        erase.erase(other, [MONDAY], "another")
        other.append("videos", pa.Table.from_pylist([{"video_id": MONDAY, "status": "deleted"}], tables.VIDEOS))
        stores.index(other, ["monday"], seed=2, etag="3")

    with meanwhile(monkeypatch, "rewrite", lift):
        erase.erase(store, [MONDAY], "run")
    assert is_whole(store, "monday")
    assert left_of(store, words[1:]) == []
    assert MONDAY not in store.forgotten()


def test_a_lifted_tombstone_of_an_old_name_stays_lifted(store):
    stores.index(store, ["cam"], seed=5)
    erase.erase(store, [CAM], "run")
    store.append("videos", pa.Table.from_pylist([{"video_id": CAM, "status": "deleted"}], tables.VIDEOS))
    stores.index(store, ["cam"])
    stores.move(store, "cam", "monday")
    erase.erase(store, [MONDAY], "run")
    assert store.forgotten() == {MONDAY}
    stores.index(store, ["cam"], seed=1, etag="2")
    assert is_whole(store, "cam")


def test_a_shard_that_was_written_meanwhile_is_deleted_only_once_no_commit_can_name_it(moved, monkeypatch):
    store, words = moved
    other = Store.open(store.uri)
    made = stores.encoded(["cam"], seed=1)
    outcomes, late = [], []
    plain = erase.remove_files

    def write():
        outcomes.append(write_shards(store.uri, made, stores.LONG.fingerprint))

    def remove(folder, paths):
        if outcomes and not late and outcomes[0]["tokens_shard"][0].as_py()["path"] in paths:
            late.append(other.commit(outcomes[0], stores.videos(outcomes[0], ["cam"], stores.LONG.fingerprint)))
        return plain(folder, paths)

    monkeypatch.setattr(erase, "remove_files", remove)
    with meanwhile(monkeypatch, "rewrite", write):
        assert erase.erase(store, [MONDAY], "run").still_there == []
    assert late == [{*made["write_id"].to_pylist()}]
    assert is_whole(store)
    assert left_of(store, words) == []
