import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from fsspec.implementations.local import LocalFileOpener
from pyarrow import parquet
from stores import rows

from longvlm.pipeline.store.health import OutOfReachError, damaged_files
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep import erase
from longvlm.pipeline.store.upkeep.compact import compact, merge_small_files, rewrite
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.identity import video_id


def answer(store, name, text):
    (video,) = rows(store, f"FROM live_videos WHERE uri = '{stores.uri_of(name)}'")
    given = {"write_id": video["write_id"], "video_id": video["video_id"], "uri": video["uri"], "answer": text}
    store.append("answers", pa.Table.from_pylist([{**given, "question": f"about {name}?"}], tables.ANSWERS))
    said = {name: given[name] for name in ("write_id", "video_id", "uri")} | {"prediction": text, "judge": "exact#1"}
    store.append("verdicts", pa.Table.from_pylist([said], tables.VERDICTS))


def bytes_below(folder):
    return b"".join(path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file())


SECRET = video_id(stores.uri_of("secret"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory, empty_store):
    """Five videos in several files, merged once, with answers: where they lie, and what was encoded of secret."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("filled") / "store")))
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    secret = stores.index(store, ["secret", "other"], seed=99)
    answer(store, "secret", "the-secret-answer")
    answer(store, "other", "the-other-answer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longvlm.pipeline.store.upkeep.compact._MIN_FILES", 4)
        merge_small_files(store)
    stores.index(store, ["secret"], seed=100)
    answer(store, "secret", "the-later-answer")
    return store.uri, secret


@pytest.fixture
def full(tmp_path, filled):
    """A copy of them, and what was encoded of secret."""
    uri, secret = filled
    return Store.open(str(shutil.copytree(uri, tmp_path / "store"))), secret


@pytest.fixture(scope="module")
def erased_once(tmp_path_factory, filled):
    """Where these lie without secret, whose live write was before: its row."""
    uri, _ = filled
    store = Store.open(str(shutil.copytree(uri, tmp_path_factory.mktemp("erased") / "store")))
    (before,) = rows(store, "FROM live_videos WHERE uri LIKE '%secret%'")
    erase.erase(store, [SECRET], "run")
    return store.uri, before


@pytest.fixture
def erased(tmp_path, erased_once):
    """A copy of them, and a row of something else that was written of secret before and is to be committed late."""
    uri, before = erased_once
    late = {"write_id": before["write_id"], "video_id": SECRET, "uri": before["uri"]}
    return Store.open(str(shutil.copytree(uri, tmp_path / "store"))), late


def test_no_byte_of_a_forgotten_video_is_left(full):
    store, secret = full
    tokens = [segment["local"] for segment in secret.to_pylist()[0]["segments"]]
    others = [segment["local"] for segment in secret.to_pylist()[1]["segments"]]
    write_index_duckdb(store.uri, store.pin())
    before = bytes_below(store.uri)
    words = [b"/videos/secret.mp4", b"the-secret-answer", b"the-later-answer", b"about secret?"]
    assert all(word in before for word in (*words, *tokens, *others))
    erased = erase.erase(store, [SECRET], "run")
    write_index_duckdb(store.uri, store.pin())
    after = bytes_below(store.uri)
    assert not [word for word in (*words, *tokens) if word in after]
    assert all(word in after for word in (b"/videos/other.mp4", b"the-other-answer", *others))
    assert erased.videos == 1
    assert erased.rows == {"tokens": 8, "segments": 8, "verdicts": 2, "answers": 2, "videos": 2}
    assert erased.files_deleted > 0
    assert erased.still_there == []
    live = rows(store, "FROM live_videos")
    assert len(live) == 4
    assert read_tokens(store.pin(), [video["write_id"] for video in live]).num_rows == 16
    again = erase.erase(store, [SECRET], "run")
    assert (again.rows, again.files_deleted) == (dict.fromkeys(again.rows, 0), 0)
    assert rows(store, "SELECT count(*) AS n FROM ledger_videos WHERE status = 'deleted'") == [{"n": 4}]  # a proof each


@pytest.fixture
def unaware(monkeypatch):
    """Gives a function that commits as a writer did which knows no tombstones."""

    def commit(write):
        with monkeypatch.context() as patch:
            patch.setattr(Store, "forgotten", lambda *_: frozenset())
            write()

    return commit


@pytest.mark.usefixtures("few_are_merged")
def test_it_stays_out_whatever_is_committed_later_and_upkeep_drops_that(erased, unaware):
    store, _ = erased
    unaware(lambda: stores.index(store, ["secret"], seed=101))
    assert len(rows(store, "FROM live_videos")) == 4
    assert len(dead_writes(store, 48).write_ids) == 1
    compact(store, dead_writes(store, 48))
    assert rows(store, "SELECT count(*) AS n FROM ledger_tokens") == [{"n": 4 * 4}]


def test_a_moved_video_is_forgotten_with_what_it_was(full):
    store, _ = full
    (old,) = rows(store, "FROM live_videos WHERE uri LIKE '%secret%'")
    new = {key: value for key, value in old.items() if key in tables.VIDEOS.names}
    new |= {"video_id": video_id("/videos/renamed.mp4"), "uri": "/videos/renamed.mp4"}
    gone = {"video_id": old["video_id"], "uri": old["uri"], "status": "deleted"}
    store.append("videos", pa.Table.from_pylist([new, gone], tables.VIDEOS))
    erased = erase.erase(store, [new["video_id"]], "run")
    assert erased.videos == 2
    left = bytes_below(store.uri)
    assert b"secret" not in left
    assert b"renamed" not in left


def test_shards_of_a_run_that_died_or_sleeps_are_erased_and_cannot_be_committed(full):
    store, _ = full
    made = stores.encoded(["secret", "also"], seed=5)
    asleep = Store.open(store.uri)
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    erased = erase.erase(store, [SECRET], "run")
    assert erased.still_there == []
    assert not Path(store.uri, "tokens", outcomes["tokens_shard"][0].as_py()["path"]).exists()
    left_out = asleep.commit(outcomes, stores.videos(outcomes, ["secret", "also"], stores.LONG.fingerprint))
    assert left_out == {*made["write_id"].to_pylist()}
    assert "also" not in live(store)
    stores.index(asleep, ["also"])
    assert "also" in live(store)


def test_what_is_written_of_it_later_is_not_committed(erased):
    store, late = erased
    for table in ("verdicts", "answers"):
        other = {"write_id": "w", "video_id": "other", "uri": "/videos/other.mp4"}
        left_out = store.append(table, pa.Table.from_pylist([late, other], tables.TABLES[table]))
        assert left_out["video_id"].to_pylist() == [SECRET]
    stores.index(store, ["secret", "also"], seed=3)
    assert erase.left_over(store, 48) == []
    assert b"secret" not in bytes_below(store.uri)


def test_an_erasure_that_is_killed_is_finished_by_the_next(full):
    store, _ = full
    script = (
        "import os, signal, sys\n"
        "from longvlm.pipeline.store.upkeep import erase\n"
        "from longvlm.pipeline.store.ledger import Store\n"
        "plain, done = erase.rewrite, []\n"
        "def rewrite(store, table, *rest, **options):\n"
        "    if table == 'segments': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(store, table, *rest, **options)\n"
        "erase.rewrite = rewrite\n"
        "erase.erase(Store.open(sys.argv[1]), [sys.argv[2]], 'run')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, store.uri, SECRET], check=False)
    assert killed.returncode == -9
    assert len(rows(store, "FROM live_videos")) == 4
    assert b"the-secret-answer" in bytes_below(store.uri)
    erase.erase(Store.open(store.uri), [video_id(stores.uri_of("v2"))], "run")
    assert erase.left_over(store, 48) == [SECRET]
    erase.erase(Store.open(store.uri), [SECRET], "run")
    assert erase.left_over(store, 48) == []
    assert b"secret" not in bytes_below(store.uri)


def test_videos_that_the_store_never_saw_are_named(store):
    stores.index(store, ["a"])
    assert erase.unknown_videos(store, [video_id(stores.uri_of("a")), "nobody"]) == {"nobody"}


def test_files_cut_off_by_a_killed_writer_go_with_what_they_may_hold(full):
    store, _ = full
    whole = next(Path(store.uri, "tokens").glob("*.parquet"))
    path = Path(store.uri, "tokens", "half.parquet")
    path.write_bytes(whole.read_bytes()[:5000])
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert not path.exists()


def fail_reads(monkeypatch, name, times):
    """Let reads of the files of a name fail as those of a bucket that does not answer, so many times."""
    left, read = [times], LocalFileOpener.read

    def fail(file, *args):
        if left[0] and file.path.endswith(name):
            left[0] -= 1
            raise TimeoutError  # as fsspec's, without a number
        return read(file, *args)

    monkeypatch.setattr(LocalFileOpener, "read", fail, raising=False)
    monkeypatch.setattr("longvlm.pipeline.store.health._PAUSES_S", (0.0, 0.0))


def test_a_file_that_is_out_of_reach_is_tried_again_and_not_taken_for_one_that_holds_the_video(full, monkeypatch):
    """No log names it: a run under way wrote it, of another video."""
    store, _ = full
    others = write_shards(store.uri, stores.encoded(["other"]), stores.LONG.fingerprint)
    name = others["tokens_shard"][0]["path"].as_py()
    path = Path(store.uri, "tokens", name)
    with monkeypatch.context() as patch:
        fail_reads(patch, name, 100)
        (said,) = erase.erase(store, [SECRET], "run").still_there
    assert said.startswith(f"{path} cannot be read (TimeoutError)")
    assert path.exists()
    assert erase.left_over(store, 48) == [SECRET]
    with monkeypatch.context() as patch:
        fail_reads(patch, name, 2)
        assert erase.erase(store, [SECRET], "run").still_there == []
    assert path.exists()


@pytest.mark.parametrize("table", ["tokens", "answers", "videos"])
def test_a_file_that_is_out_of_reach_is_not_damaged(full, monkeypatch, table):
    store, _ = full
    file = store.pin().table(table).files[0]
    with monkeypatch.context() as patch:
        fail_reads(patch, file.uri, 2)
        assert verify(store.pin()).damaged_files == {}
    for act in (lambda: verify(store.pin()), lambda: damaged_files(store.pin()), lambda: rewrite_all(store, table)):
        with monkeypatch.context() as patch:
            fail_reads(patch, file.uri, 100)
            with pytest.raises(OutOfReachError, match="cannot be read"):
                act()
    assert file in store.pin().table(table).files


def rewrite_all(store, table):
    """Rewrite every file of a table, whatever of it is damaged."""
    rewrite(store, table, store.pin().table(table).files, lambda rows: rows, damaged={})


@pytest.mark.usefixtures("few_are_merged")
def test_what_a_machine_dropped_whose_clock_is_ahead_goes_too(full, monkeypatch):
    store, _ = full
    stores.index(store, ["later"])
    with monkeypatch.context() as patch:
        ahead_ns = time.time_ns() + 3_600_000_000_000
        patch.setattr(time, "time_ns", lambda: ahead_ns)
        assert merge_small_files(Store.open(store.uri))["videos"] == 2
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert b"secret" not in bytes_below(store.uri)


def test_a_file_that_nobody_can_delete_is_told(full, monkeypatch):
    store, _ = full
    monkeypatch.setattr(erase, "remove_files", lambda *_: [])
    (first, *_) = erase.erase(store, [SECRET], "run").still_there
    assert first.startswith(f"{store.uri}/tokens/")
    monkeypatch.undo()
    assert erase.left_over(store, 48) == [SECRET]


def test_what_somebody_commits_while_it_is_erased_is_found_by_the_proof(full, unaware, monkeypatch):
    store, _ = full
    (before,) = rows(store, "FROM live_videos WHERE uri LIKE '%secret%'")
    late = {"write_id": before["write_id"], "video_id": SECRET, "uri": before["uri"], "answer": "the-late-answer"}
    plain = erase.delete_old_versions

    def interrupted(*args):
        unaware(lambda: store.append("answers", pa.Table.from_pylist([late], tables.ANSWERS)))
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(erase, "delete_old_versions", interrupted)
        (left,) = erase.erase(store, [SECRET], "run").still_there
    assert "holds rows that were committed meanwhile" in left
    assert erase.left_over(store, 48) == [SECRET]
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert erase.left_over(store, 48) == []
    assert b"the-late-answer" not in bytes_below(store.uri)


def test_what_was_rotten_before_is_not_sealed_under_a_new_checksum(full):
    store, secret = full
    blob = secret.to_pylist()[1]["segments"][2]["local"]  # of another video in the same file
    (path,) = (path for path in Path(store.uri, "tokens").glob("*.parquet") if blob in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(blob) + 5] ^= 1
    path.write_bytes(content)
    erased = erase.erase(store, [SECRET], "run")
    assert (erased.videos_torn, erased.still_there) == (1, [])
    assert live(store) == {f"v{number}" for number in range(3)}  # the other is to be indexed again
    verified = verify(store.pin())
    assert (verified.damaged_files, verified.problems) == ({}, [])


def flip_in_column(path, name):
    """The last bit of a column of the first row group."""
    group = parquet.ParquetFile(path).metadata.row_group(0)
    (column,) = (column for column in map(group.column, range(group.num_columns)) if column.path_in_schema == name)
    content = bytearray(Path(path).read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    Path(path).write_bytes(content)


def written_by_a_run_that_died(store, seed, *, is_named=True):
    """Shards of secret that never was live by them, which nothing but the ids in them tells of: the outcomes, paths."""
    outcomes = stores.write_shards(store.uri, stores.encoded(["secret"], seed=seed), stores.LONG.fingerprint)
    if is_named:
        store.commit(outcomes, tables.VIDEOS.empty_table())
    shards = {table: outcomes[f"{table}_shard"][0].as_py()["path"] for table in ("tokens", "segments")}
    return outcomes, [Path(store.uri, table, name) for table, name in shards.items()]


def test_files_whose_ids_rotted_may_hold_the_video_and_go(full):
    store, _ = full
    written = {}
    for seed, (name, is_named) in enumerate(product(("video_id", "write_id"), (True, False))):
        _, written[name, is_named] = written_by_a_run_that_died(store, seed, is_named=is_named)
        for path in written[name, is_named]:
            flip_in_column(path, name)
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert [case for case, paths in written.items() if any(path.exists() for path in paths)] == []


def test_what_a_footer_says_of_ids_hides_no_row(full):
    """Footers have no checksums, and by what they say of a column SQL passes over row groups."""
    store, _ = full
    written = {}
    for seed, name in enumerate(("video_id", "write_id")):
        outcomes, written[name] = written_by_a_run_that_died(store, seed)
        said = outcomes[name][0].as_py().encode()
        for path in written[name]:
            content = path.read_bytes()
            footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            path.write_bytes(content[:footer] + content[footer:].replace(said, bytes([said[0] ^ 4]) + said[1:]))
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert [name for name, paths in written.items() if any(path.exists() for path in paths)] == []


def test_a_ledger_that_rotted_is_told_and_after_its_repair_the_erasure_goes_on(full):
    store, _ = full
    path = Path(store.pin(("videos",)).table("videos").files[-1].uri)
    flip_in_column(path, "uri")
    (left,) = erase.erase(store, [SECRET], "run").still_there
    assert str(path) in left
    assert "maintain --repair" in left
    repair(store, verify(store.pin()), "run")
    assert erase.erase(store, [SECRET], "run").still_there == []
    assert b"secret" not in bytes_below(store.uri)


def live(store):
    return {Path(row["uri"]).stem for row in rows(store, "FROM live_videos")}


def readable(store):
    """Of how many live videos every token can be read."""
    found = [row["write_id"] for row in rows(store, "FROM live_videos")]
    return read_tokens(store.pin(), found).num_rows // 4


def test_another_video_under_a_name_that_was_used_before_stays(store):
    stores.index(store, ["cam"])
    stores.move(store, "cam", "monday")
    stores.index(store, ["cam"], seed=1, etag="2")
    assert erase.erase(store, [video_id(stores.uri_of("monday"))], "run").videos == 1
    assert live(store) == {"cam"}
    assert readable(store) == 1
    assert b"monday" not in bytes_below(store.uri)


def test_what_moved_on_from_an_older_name_of_a_video_stays(store):
    stores.index(store, ["cam"])
    stores.move(store, "cam", "monday")
    stores.index(store, ["cam"], seed=1, etag="2")
    stores.move(store, "cam", "tuesday")
    erase.erase(store, [video_id(stores.uri_of("tuesday"))], "run")
    assert live(store) == {"monday"}
    assert readable(store) == 1
    assert b"tuesday" not in bytes_below(store.uri)


def test_what_a_writer_that_knows_no_tombstones_commits_later_is_found_and_erased(erased, unaware):
    store, late = erased
    assert erase.left_over(store, 48) == []
    verdict = pa.Table.from_pylist([late | {"prediction": "the-late-answer"}], tables.VERDICTS)
    unaware(lambda: store.append("verdicts", verdict))
    assert erase.left_over(store, 48) == [SECRET]
    answers = pa.Table.from_pylist([late | {"answer": "the-late-answer"}], tables.ANSWERS)
    unaware(lambda: store.append("answers", answers))
    unaware(lambda: stores.index(store, ["secret", "also"], seed=3))
    assert "secret" not in live(store)
    assert erase.left_over(store, 48) == [SECRET]
    again = erase.erase(store, [SECRET], "run")
    assert again.rows == {"tokens": 4, "segments": 4, "verdicts": 1, "answers": 1, "videos": 1}
    assert erase.left_over(store, 48) == []
    left = bytes_below(store.uri)
    assert b"the-late-answer" not in left
    assert b"/videos/secret.mp4" not in left
    assert "also" in live(store)


def test_in_a_bucket_no_object_keeps_a_byte(s3):
    store = Store.create("s3://bucket/index")
    store.register_recipe(stores.LONG, "some/model")
    secret = stores.index(store, ["secret", "other"], seed=99)
    stores.index(store, ["third"])
    answer(store, "secret", "the-secret-answer")
    erased = erase.erase(store, [SECRET], "run")
    assert erased.rows == {"tokens": 4, "segments": 4, "verdicts": 1, "answers": 1, "videos": 1}
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket="bucket")["Contents"]]
    left = b"".join(s3.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys)
    blob = secret.to_pylist()[0]["segments"][0]["local"]
    assert not [word for word in (b"/videos/secret.mp4", b"the-secret-answer", blob) if word in left]
    assert b"/videos/other.mp4" in left
    assert readable(store) == 2
