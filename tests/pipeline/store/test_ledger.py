import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
import stores

from longvlm.pipeline.store.catalog import connect, query
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep.compact import compact, merge_small_files
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.erase import erase
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id

SPAWN = multiprocessing.get_context("spawn")
LONG, TINY = stores.LONG.fingerprint, stores.TINY.fingerprint


def newest(store) -> dict[tuple[str, str], str]:
    """{(name, recipe): status} of the newest rows."""
    return {(Path(row["uri"]).stem, row["recipe"]): row["status"] for row in stores.newest(store).to_pylist()}


# --- making and opening ---


def test_a_store_is_made_once_and_found_again(tmp_path):
    uri = str(tmp_path / "new" / "store")
    Store.create(uri).register_recipe(stores.LONG, "model")
    assert [entry.name for entry in Store.create(uri).recipes()] == ["long"]
    assert set(Store.open(uri).pin().tables) == set(tables.TABLES)


def test_two_processes_may_make_the_same_store_at_once(tmp_path):
    uri = str(tmp_path / "store")
    start = SPAWN.Barrier(3)
    makers = [SPAWN.Process(target=stores.create, args=(uri, start)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert {table.version for table in Store.open(uri).pin().tables.values()} == {0}


def test_where_no_store_is_the_sentence_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="longvlm index SOURCE --store"):
        Store.open(str(tmp_path / "nothing"))
    assert not list(tmp_path.iterdir())


def test_a_store_cannot_be_made_under_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Store.create(str(tmp_path / "file" / "store"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_read_only_folder_is_refused_and_left_as_it_was(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="read-only"):
        Store.create(str(tmp_path / "store"))
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system here that nobody can write to")
def test_a_file_system_that_nobody_can_write_to_is_refused():
    with pytest.raises(InputError, match="cannot be written"):
        Store.create("/proc/store")


# --- the newest row and what is live ---


def test_the_newest_row_counts_per_video_and_recipe(store):
    stores.index(store, ["a", "b"])
    stores.index(store, ["a"], stores.TINY)
    stores.index(store, ["a"], status="failed", error_code="truncated")
    assert newest(store) == {("a", LONG): "failed", ("a", TINY): "indexed", ("b", LONG): "indexed"}
    row = next(row for row in stores.newest(store).to_pylist() if row["status"] == "failed")
    assert (row["etag"], row["size_bytes"], row["attempts"], row["source"]) == ("1", 9, 1, "/videos")


@pytest.mark.parametrize("recipe", [None, LONG])
def test_a_deletion_ends_every_recipe_until_the_video_is_back(store, recipe):
    stores.index(store, ["a", "b"])
    stores.index(store, ["a"], stores.TINY)
    store.append("videos", stores.deleted(["a"], recipe))
    assert newest(store) == {("a", LONG): "deleted", ("a", TINY): "deleted", ("b", LONG): "indexed"}
    stores.index(store, ["a"])
    assert newest(store) == {("a", LONG): "indexed", ("a", TINY): "deleted", ("b", LONG): "indexed"}


def test_seq_is_the_moment_of_the_commit_raised_above_the_ledger(store, monkeypatch):
    started_us = time.time_ns() // 1000
    stores.index(store, ["a", "b"])
    first = stores.newest(store)["seq"].to_pylist()
    assert first[0] == first[1]
    assert started_us <= first[0] <= time.time_ns() // 1000
    monkeypatch.setattr(time, "time_ns", lambda: 5_000)  # a clock that was set back
    stores.index(Store.open(store.uri), ["c"])
    assert max(stores.newest(store)["seq"].to_pylist()) == first[0] + 1


def test_shards_are_seen_only_with_their_videos(store):
    made = stores.encoded(["a"])
    outcomes = write_shards(store.uri, made, LONG)
    store.commit(outcomes, tables.VIDEOS.empty_table())
    assert stores.rows(store, "FROM segments") == []
    store.commit(outcomes, stores.videos(outcomes, ["a"], LONG))
    store.commit(outcomes, tables.VIDEOS.empty_table())
    snapshot = store.pin()
    assert query(connect(snapshot, ("segments",)), "FROM segments").num_rows == 4
    assert [len(snapshot.table(name).files) for name in ("tokens", "segments", "videos")] == [1, 1, 1]


def test_an_empty_commit_writes_nothing(store):
    store.commit(tables.OUTCOMES.empty_table(), tables.VIDEOS.empty_table())
    store.append("answers", tables.ANSWERS.empty_table())
    assert [store.pin().table(name).version for name in ("videos", "answers")] == [0, 0]


def test_every_25_commits_the_log_gets_a_checkpoint(store):
    run = pa.Table.from_pylist([{"run_id": "r", "job": "index"}], tables.RUNS)
    for _ in range(26):
        store.append("runs", run)
    assert list(Path(store.uri, "runs", "_delta_log").glob("*.checkpoint.parquet"))
    assert stores.rows(store, "SELECT count(DISTINCT seq) AS n FROM runs") == [{"n": 26}]


# --- recipes ---


def test_the_first_recipe_is_active_and_another_can_be_promoted(store):
    assert store.active_recipe().recipe == stores.LONG
    assert store.promote("tiny").fingerprint == TINY
    assert [(entry.name, entry.active) for entry in Store.open(store.uri).recipes()] == [
        ("long", False),
        ("tiny", True),
    ]
    version = store.pin().table("recipes").version
    store.promote(TINY)
    assert store.pin().table("recipes").version == version
    assert store.promote(LONG).active


def test_a_recipe_is_registered_once_and_again_only_under_a_new_name_or_model(store):
    version = store.pin().table("recipes").version
    store.register_recipe(stores.LONG, "some/model")
    assert store.pin().table("recipes").version == version
    store.register_recipe(stores.LONG, "other/model")
    assert [(entry.name, entry.model) for entry in store.recipes()] == [("long", "other/model"), ("tiny", "some/model")]
    assert store.active_recipe().name == "long"


def test_promoting_what_is_not_clear_names_what_there_is(store):
    with pytest.raises(InputError, match=rf"long \({LONG}\), tiny \({TINY}\)"):
        store.promote("paper")
    store.register_recipe(stores.recipe.from_settings({"name": "long", "tokens_per_segment": 40}, stores.TOWER), "m")
    with pytest.raises(InputError, match="several"):
        store.promote("long")


def test_a_store_without_recipes_has_no_active_one(tmp_path):
    store = Store.create(str(tmp_path))
    assert store.active_recipe() is None
    with pytest.raises(InputError, match="none yet"):
        store.promote("long")


# --- several processes ---


def test_two_writers_of_which_one_is_killed_and_a_reader_lose_nothing(store, tmp_path):
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    writers = [SPAWN.Process(target=stores.append, args=(store.uri, log.stem, str(log)), daemon=True) for log in logs]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    seen = 0
    while min(_num_noted(log) for log in logs) < 8:
        assert time.monotonic() < deadline
        seen = _check_what_a_reader_sees(store.uri, seen)
    os.kill(writers[0].pid, signal.SIGKILL)
    noted = _num_noted(logs[1])
    while _num_noted(logs[1]) < noted + 4:
        assert time.monotonic() < deadline
        seen = _check_what_a_reader_sees(store.uri, seen)
    writers[1].kill()
    for writer in writers:
        writer.join()
    committed = {video_id(stores.uri_of(name)) for log in logs for name in log.read_text().splitlines()}
    assert committed <= set(stores.newest(Store.open(store.uri))["video_id"].to_pylist())
    stores.index(store, ["afterwards"])
    _check_what_a_reader_sees(store.uri, len(committed) + 1)


def _num_noted(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def _check_what_a_reader_sees(uri: str, at_least: int) -> int:
    """Every live video has all its segments and tokens, and none is lost again; how many there are."""
    snapshot = Store.open(uri).pin()
    with connect(snapshot, ("live_videos",)) as con:
        rows = query(
            con, "SELECT write_id, count(*) AS n FROM live_videos LEFT JOIN ledger_segments USING (write_id) GROUP BY 1"
        ).to_pylist()
    assert len(rows) >= at_least
    assert {row["n"] for row in rows} <= {4}
    assert read_tokens(snapshot, [row["write_id"] for row in rows]).num_rows == 4 * len(rows)
    return len(rows)


def test_a_store_from_before_a_table_is_read_kept_and_given_the_table_with_its_first_row(store):
    stores.index(store, ["a", "b"])
    shutil.rmtree(Path(store.uri) / "verdicts")
    old = Store.open(store.uri)
    with connect(old.pin()) as con:
        assert query(con, "FROM verdicts").num_rows == query(con, "FROM scores").num_rows == 0
        (live, _) = query(con, "SELECT write_id FROM live_videos ORDER BY uri").to_pylist()
    write_index_duckdb(old.uri, old.pin())
    assert (merge_small_files(old)["verdicts"], compact(old, dead_writes(old, 48))["verdicts"]) == (0, 0)
    assert vacuum(old, 48)["files"] == 0
    assert not verify(old.pin()).problems
    assert erase(old, [video_id(stores.uri_of("b"))], "run").rows["verdicts"] == 0
    assert not old.has("verdicts")
    rows = [{**live, "question": "1", "is_right": True}, {**live, "question": "2", "is_right": False}]
    old.append("verdicts", pa.Table.from_pylist([row | {"status": "judged"} for row in rows], tables.VERDICTS))
    with connect(Store.open(store.uri).pin()) as con:
        assert query(con, "SELECT num_judged, accuracy FROM scores").to_pylist() == [{"num_judged": 2, "accuracy": 0.5}]
