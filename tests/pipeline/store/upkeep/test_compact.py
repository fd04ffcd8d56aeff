import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stores
from deltalake.exceptions import CommitFailedError

from longvlm.pipeline.store import files
from longvlm.pipeline.store.catalog import connect, query
from longvlm.pipeline.store.files import write_parquet
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens
from longvlm.pipeline.store.upkeep import compact as upkeep
from longvlm.pipeline.store.upkeep.compact import compact, merge_small_files
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.vacuum import vacuum
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from support import HELPERS

LIVE = "SELECT uri, segment, start_s, embedding, external_id FROM segments ORDER BY uri, segment"


def test_merging_keeps_every_row_and_the_readers_that_were_there_before(store):
    for number in range(9):
        stores.index(store, [f"v{number}"], seed=number)
    before = store.pin()
    rows = query(connect(before, ("segments",)), LIVE)
    assert merge_small_files(store) == {"videos": 8, "segments": 8, "answers": 0, "verdicts": 0}
    after = store.pin()
    assert {name: len(table.files) for name, table in after.tables.items()} | {"recipes": 0} == {
        "videos": 1, "segments": 1, "tokens": 9, "answers": 0, "verdicts": 0, "recipes": 0,
        "runs": 0,
    }  # fmt: skip
    assert query(connect(after, ("segments",)), LIVE).equals(rows)
    assert query(connect(before, ("segments",)), LIVE).equals(rows)
    assert stores.newest(Store.open(store.uri)).num_rows == 9
    assert merge_small_files(store) == {"videos": 0, "segments": 0, "answers": 0, "verdicts": 0}


def test_two_mergers_of_the_same_files_do_not_double_them(store):
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    pinned = store.pin().table("segments")
    rows = pq.ParquetDataset([file.uri for file in pinned.files]).read()
    first, second = (write_parquet(store.uri, "segments", rows) for _ in range(2))
    store.replace_files("segments", pinned.files, [first])
    with pytest.raises(CommitFailedError):
        store.replace_files("segments", pinned.files, [second])
    assert stores.rows(store, "SELECT count(*) AS n FROM ledger_segments") == [{"n": 12}]


@pytest.mark.usefixtures("few_are_merged")
def test_a_writer_whose_handle_is_older_than_a_merge_loses_and_doubles_nothing(store):
    other = Store.open(store.uri)
    made = stores.encoded(["mine"])
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, stores.videos(outcomes, ["mine"], stores.LONG.fingerprint))
    for number in range(2):
        stores.index(other, [f"v{number}"], seed=number)
    assert merge_small_files(other)["videos"] == 2
    store.commit(outcomes, stores.videos(outcomes, ["mine"], stores.LONG.fingerprint))  # names its shards once more
    assert stores.rows(store, "SELECT count(*) AS n FROM videos") == [{"n": 3}]
    assert stores.rows(store, "SELECT count(*) AS n FROM segments") == [{"n": 12}]


def test_files_of_mostly_dead_rows_are_rewritten_without_them(store):
    stores.index(store, ["a", "b", "c"])
    stores.index(store, ["a", "b"], seed=1)
    live = [row["write_id"] for row in stores.rows(store, "SELECT write_id FROM live_videos")]
    before = read_tokens(store.pin(), live)
    assert compact(store, dead_writes(store, 48)) == {
        "videos": 0,
        "tokens": 0,
        "segments": 0,
        "answers": 0,
        "verdicts": 0,
    }
    assert compact(store, dead_writes(store, 0)) == {
        "videos": 0,
        "tokens": 0,
        "segments": 0,
        "answers": 0,
        "verdicts": 0,
    }
    assert stores.rows(store, "SELECT count(*) AS n FROM ledger_tokens") == [{"n": 12}]
    assert read_tokens(store.pin(), live).equals(before)


def test_a_file_of_dead_rows_alone_is_dropped_and_videos_rows_never(store):
    stores.index(store, ["a"])
    store.append("videos", stores.deleted(["a"]))
    assert compact(store, dead_writes(store, 0)) == {
        "videos": 0,
        "tokens": 1,
        "segments": 1,
        "answers": 0,
        "verdicts": 0,
    }
    counts = "SELECT (SELECT count(*) FROM ledger_tokens) AS tokens, (SELECT count(*) FROM ledger_videos) AS videos"
    assert stores.rows(store, counts) == [{"tokens": 0, "videos": 2}]


def test_large_files_are_rewritten_piece_by_piece_with_a_row_group_a_video(store, monkeypatch):
    monkeypatch.setattr(upkeep, "_PIECE_BYTES", 20_000)
    monkeypatch.setitem(files._MAX_SHARED_BYTES, "tokens", 1)
    names = [f"v{i:02}" for i in range(20)]
    stores.index(store, names)
    stores.index(store, names[:12], seed=1)
    live = [row["write_id"] for row in stores.rows(store, "SELECT write_id FROM live_videos")]
    before = read_tokens(store.pin(), live)
    compact(store, dead_writes(store, 0))
    pinned = store.pin().table("tokens").files
    assert sorted(file.num_rows for file in pinned) == [32, 48]
    assert all(pq.ParquetFile(file.uri).num_row_groups == file.num_rows // 4 for file in pinned)
    assert read_tokens(store.pin(), live).equals(before)


@pytest.mark.usefixtures("few_are_merged")
def test_merging_ends_where_rows_take_much_more_memory_than_disk(store, monkeypatch):
    monkeypatch.setattr(upkeep, "_PIECE_BYTES", 1000)
    for number in range(6):
        stores.index(store, [f"v{number}"], seed=number)
    assert merge_small_files(store)["videos"] == 5
    (merged,) = store.pin().table("videos").files
    assert (merged.num_rows, Path(merged.uri).stat().st_size) == (6, merged.size_bytes)
    assert merge_small_files(store)["videos"] == 0


def test_units_of_a_wave_that_was_planned_long_ago_are_not_taken_for_abandoned(store, monkeypatch):
    made = stores.encoded(["long"])
    days_ago = time.time_ns() - 3 * 86_400 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: days_ago)
    made = made.set_column(1, "write_id", pa.array([stores.new_write_id()]))
    monkeypatch.undo()
    outcomes = stores.write_shards(store.uri, made, stores.LONG.fingerprint)
    store.commit(outcomes, tables.VIDEOS.empty_table())  # the first of its units
    stores.index(store, ["later"], seed=1)
    assert not len(dead_writes(store, 48).write_ids)
    assert dead_writes(store, 0).write_ids.to_pylist() == made["write_id"].to_pylist()


@pytest.mark.usefixtures("few_are_merged")
def test_who_loses_against_another_merger_leaves_no_file_behind(store):
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    pinned = store.pin().table("segments")
    merge_small_files(Store.open(store.uri))
    with pytest.raises(CommitFailedError):
        upkeep.rewrite(store, "segments", pinned.files, lambda rows: rows)
    assert len(list(Path(store.uri, "segments").glob("*.parquet"))) == 3 + 1


@pytest.mark.usefixtures("few_are_merged")
def test_a_damaged_file_is_not_copied_and_the_others_are_merged(store, caplog, monkeypatch):
    heard = logging.getLogger("longvlm")
    monkeypatch.setattr(heard, "handlers", [caplog.handler])  # whatever jobs made of it before
    caplog.set_level(logging.WARNING, logger="longvlm")
    for number in range(4):
        stores.index(store, [f"v{number}"], seed=number)
    ill = store.pin().table("segments").files[0].uri
    content = bytearray(Path(ill).read_bytes())
    group = pq.ParquetFile(ill).metadata.row_group(0)
    (vectors,) = [
        column for i in range(group.num_columns) if (column := group.column(i)).path_in_schema.startswith("embedding.")
    ]
    content[vectors.data_page_offset + vectors.total_compressed_size - 1] ^= 1
    Path(ill).write_bytes(content)
    assert merge_small_files(store)["segments"] == 2
    assert ill in {file.uri for file in store.pin().table("segments").files}
    assert len(store.pin().table("segments").files) == 2
    assert ill in caplog.text


@pytest.mark.usefixtures("few_are_merged")
def test_compacting_while_others_write_loses_and_doubles_nothing(store, tmp_path):
    script = "import sys, stores; stores.append(*sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(HELPERS)}
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    writers = [
        subprocess.Popen([sys.executable, "-c", script, store.uri, f"w{i}", str(log), "12"], env=env)
        for i, log in enumerate(logs)
    ]
    try:
        while any(writer.poll() is None for writer in writers):
            compact(store, dead_writes(store, 48))
            vacuum(store, 48)
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.wait() for writer in writers] == [0, 0]
    compact(store, dead_writes(store, 48))
    assert len(store.pin().table("segments").files) < 24
    committed = {name for log in logs for name in log.read_text().splitlines()}
    assert len(committed) == 48
    rows = stores.rows(store, "SELECT uri, write_id FROM live_videos")
    assert {stores.uri_of(name) for name in committed} <= {row["uri"] for row in rows}
    checked = verify(store.pin())
    assert (checked.damaged_files, checked.problems) == ({}, [])
    assert checked.num_videos == len(rows) == len({row["write_id"] for row in rows})
