import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from pyarrow import parquet

from longvlm.jobs.query.sql import run_sql
from longvlm.jobs.query.status import describe_store, list_runs
from longvlm.pipeline.store.health import damaged_files
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables


def footer_of(content):
    """Where a parquet file's footer begins and ends."""
    end = len(content) - 8
    return end - int.from_bytes(content[-8:-4], "little"), end


def flips(path, number):
    """The content of a file with a bit of its footer flipped, in so many places."""
    content = path.read_bytes()
    start, end = footer_of(content)
    for i in range(number):
        at = start + (end - start) * i // number
        yield content[:at] + bytes([content[at] ^ (1 << (i % 8))]) + content[at + 1 :]


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory, empty_store):
    """Where a store lies of two videos, an answer and a run, each in files of its own."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("filled") / "store")))
    stores.index(store, ["a"])
    stores.index(store, ["b"], seed=1)
    store.append("answers", pa.Table.from_pylist([{"question": "?"}], tables.ANSWERS))
    store.append("runs", pa.Table.from_pylist([{"run_id": "r", "job": "index", "counts": "{}"}], tables.RUNS))
    return store.uri


@pytest.fixture
def filled(tmp_path, filled_once):
    """A copy of it."""
    return Store.open(str(shutil.copytree(filled_once, tmp_path / "filled")))


@pytest.mark.parametrize("table", ["videos", "segments", "runs", "tokens"])
def test_whatever_bit_of_a_footer_flips_nothing_ends_in_a_traceback(filled, table):
    snapshot = filled.pin(("videos", "segments", "tokens", "runs"))
    path = Path(snapshot.table(table).files[0].uri)
    found = 0
    for content in flips(path, 12):
        path.write_bytes(content)
        damaged = damaged_files(snapshot)
        found += bool(damaged)
        assert set(damaged) <= {str(path)}
        assert set(verify(snapshot).damaged_files) <= {str(path)}  # which queries what is left without it
    assert found


@pytest.mark.parametrize("table", ["videos", "segments", "answers"])
def test_a_damaged_file_is_left_out_and_told(filled, table, capsys):
    path = Path(filled.pin().table(table).files[0].uri)
    path.write_bytes(path.read_bytes()[:-9] + b"rotten!!!")
    assert run_sql(filled.uri, "SELECT count(*) AS n FROM runs").to_pylist() == [{"n": 1}]
    told = capsys.readouterr().err
    assert f"{path} is damaged" in told
    assert "longvlm maintain --verify" in told
    assert str(path) in verify(filled.pin()).damaged_files
    if table != "answers":
        assert list(describe_store(filled.uri)["damaged_files"]) == [str(path)]
    assert list_runs(filled.uri, 5)


def test_a_damaged_footer_of_segments_is_repaired(filled):
    path = Path(filled.pin().table("segments").files[0].uri)
    path.write_bytes(path.read_bytes()[:-9] + b"rotten!!!")
    assert repair(filled, verify(filled.pin()), "run").videos == 1
    verified = verify(filled.pin())
    assert (verified.damaged_files, verified.problems, verified.num_videos) == ({}, [], 1)


def test_a_file_of_other_rows_or_columns_is_damaged(store):
    stores.index(store, ["a"])
    (file,) = store.pin().table("segments").files
    rows = parquet.read_table(file.uri)
    parquet.write_table(rows.slice(1), file.uri)
    assert damaged_files(store.pin())[file.uri] == "it has 3 rows, and the log says 4"
    parquet.write_table(rows.drop_columns("start_s"), file.uri)
    assert damaged_files(store.pin())[file.uri] == "it lacks the column start_s"
    Path(file.uri).unlink()
    assert damaged_files(store.pin())[file.uri] == "it is gone"
