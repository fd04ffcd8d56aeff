import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from pyarrow import parquet

from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import write_pieces
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep import tombstones
from longvlm.pipeline.store.upkeep.compact import rewrite
from longvlm.pipeline.store.upkeep.erase import erase, left_over
from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id


def live(store):
    return {Path(row["uri"]).stem for row in stores.rows(store, "SELECT uri FROM live_videos")}


def test_videos_that_lost_tokens_are_deleted_and_the_store_is_whole_again(store):
    stores.index(store, ["well"])
    before = {file.uri for file in store.pin().table("tokens").files}
    stores.index(store, ["ill", "poorly"], seed=1)
    (damaged,) = (file.uri for file in store.pin().table("tokens").files if file.uri not in before)
    content = Path(damaged).read_bytes()
    Path(damaged).write_bytes(content[:-20] + bytes(20))  # not even a footer
    found = verify(store.pin())
    assert list(found.damaged_files) == [damaged]
    assert repair(store, found, "run").videos == 2
    assert live(store) == {"well"}
    again = verify(store.pin())
    assert (again.damaged_files, again.problems, again.num_videos) == ({}, [], 1)
    stores.index(store, ["ill"], seed=2)
    assert live(store) == {"well", "ill"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_page(path, row_group=0):
    """The last bit of the first column of a row group, which its checksum tells."""
    column = parquet.ParquetFile(path).metadata.row_group(row_group).column(0)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def flip_the_footer(path):
    content = bytearray(path.read_bytes())
    content[-8 - int.from_bytes(content[-8:-4], "little")] ^= 0x40
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


ROWS = {
    "answers": {"question": "?"},
    "verdicts": {"judge": "exact#1"},
    "recipes": {"event": "registered", "recipe": "r", "name": "n", "spec": "{}", "model": "m"},
    "runs": {"run_id": "r", "job": "index", "counts": "{}"},
}


def files_of(store, *named):
    """The files of some tables."""
    return {file.uri for table in named for file in store.pin(named).table(table).files}


def repaired_rows(store, damaged):
    """The rows lost by table to a repair of these files, after which the store is whole."""
    found = verify(store.pin())
    assert {*found.damaged_files} == damaged
    repaired = repair(store, found, "run")
    again = verify(store.pin())
    assert (again.damaged_files, again.problems, again.num_videos) == ({}, [], 1)
    assert live(store) == {"well"}
    return repaired.rows_lost


@pytest.mark.parametrize("harm", [cut, flip_a_page, flip_the_footer, empty, Path.unlink])
def test_a_damaged_file_of_the_ledger_is_repaired_and_the_store_is_whole(store, harm):
    stores.index(store, ["well"])
    before = files_of(store, "videos")
    stores.index(store, ["lost"], seed=1)
    (damaged,) = files_of(store, "videos") - before
    harm(Path(damaged))
    assert repaired_rows(store, {damaged}) == {"videos": 1}
    stores.index(store, ["lost"], seed=2)  # as the next run does, to which it is new
    assert live(store) == {"well", "lost"}


@pytest.mark.parametrize("harm", [cut, flip_a_page])
def test_damaged_files_of_all_other_tables_are_repaired_and_the_store_is_whole(store, harm):
    stores.index(store, ["well"])
    before = files_of(store, *ROWS)
    for table, row in ROWS.items():
        store.append(table, pa.Table.from_pylist([row], tables.TABLES[table]))
    damaged = files_of(store, *ROWS) - before
    for path in damaged:
        harm(Path(path))
    assert repaired_rows(store, damaged) == dict.fromkeys(ROWS, 1)


def test_what_can_be_read_of_a_damaged_ledger_is_kept(store):
    """A file of two row groups, of which the second is rotten."""
    stores.index(store, ["well"])
    stores.index(store, ["lost"], seed=1)
    old = store.pin().table("videos").files
    rows = [parquet.read_table(file.uri) for file in old]
    merged = write_pieces(store.uri, "videos", tables.VIDEOS, rows)
    store.replace_files("videos", old, [merged])
    path = Path(store.uri, "videos", merged["path"])
    flip_a_page(path, row_group=1)
    assert repair(store, verify(store.pin()), "run").rows_lost == {"videos": 1}
    (kept,) = live(store)
    assert kept in {"well", "lost"}
    assert verify(store.pin()).damaged_files == {}


# --- logs ---


def tear(commit):
    commit.write_bytes(commit.read_bytes()[:-20])


def rot(commit):
    """JSON, but not what Delta knows."""
    commit.write_bytes(commit.read_bytes().replace(b'{"add"', b'{"aed"'))


@pytest.fixture(scope="module")
def committed_once(tmp_path_factory, empty_store):
    """Where a store lies to whose tables `well` was committed first, and later `other`."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("committed") / "store")))
    for number, name in enumerate(["well", "other"]):
        stores.index(store, [name], seed=number)
        for table, row in ROWS.items():
            store.append(table, pa.Table.from_pylist([row], tables.TABLES[table]))
    return store.uri


@pytest.fixture
def committed(tmp_path, committed_once):
    """The address of a copy of it."""
    return str(shutil.copytree(committed_once, tmp_path / "committed"))


def second_to_last(uri, table):
    return sorted(Path(uri, table, "_delta_log").glob("*.json"))[-2]


@pytest.mark.parametrize(
    ("table", "harm"),
    [("videos", tear), ("tokens", tear), ("answers", tear), ("segments", Path.unlink), ("runs", Path.unlink)],
)
def test_a_log_with_a_damaged_commit_is_told_and_a_repair_does_without(committed, table, harm):
    commit = second_to_last(committed, table)
    harm(commit)
    with pytest.raises(InputError, match=f"{commit.name}, .*longvlm maintain --store {committed} --repair"):
        Store.open(committed).pin()
    report = run_maintain(MaintainOrder(committed, repair=True))
    assert [*report.repaired.commits] == [str(commit)]
    assert report.stopped is None
    store = Store.open(committed)
    again = verify(store.pin())
    assert (again.damaged_files, again.problems) == ({}, [])
    assert live(store) == ({"other"} if table in {"videos", "segments", "tokens"} else {"well", "other"})
    stores.index(store, ["well"], seed=2)
    assert live(store) == {"well", "other"}


@pytest.mark.parametrize("harm", [empty, rot])
def test_a_commit_that_delta_reads_as_nothing_is_found_and_repaired_though_nothing_is_left(committed, harm):
    (first,) = sorted(Path(committed, "runs", "_delta_log").glob("*.json"))[1:2]
    for later in sorted(first.parent.glob("*.json"))[2:]:
        later.unlink()
    harm(first)
    assert [*verify(Store.open(committed).pin()).damaged_files] == [str(first)]
    run_maintain(MaintainOrder(committed, repair=True))
    assert verify(Store.open(committed).pin()).damaged_files == {}


@pytest.mark.parametrize("table", ["videos", "runs"])
def test_a_log_that_lost_what_made_its_table_gets_it_again(committed, table):
    first = Path(committed, table, "_delta_log", f"{0:020}.json")
    first.unlink()
    assert [*run_maintain(MaintainOrder(committed, repair=True)).repaired.commits] == [str(first)]
    assert live(Store.open(committed)) == {"well", "other"}
    assert verify(Store.open(committed).pin()).damaged_files == {}


def test_a_tombstone_whose_commit_is_lost_comes_back(committed):
    store = Store.open(committed)
    erase(store, [video_id(stores.uri_of("well"))], "run")
    for commit in sorted(Path(committed, "videos", "_delta_log").glob("*.json"))[3:]:
        tear(commit)
    report = run_maintain(MaintainOrder(committed, repair=True))
    assert report.repaired.tombstones == 1
    assert Store.open(committed).forgotten() == {video_id(stores.uri_of("well"))}
    assert live(Store.open(committed)) == {"other"}


PRIVATE = video_id(stores.uri_of("private"))


@pytest.fixture(scope="module")
def erased_once(tmp_path_factory, empty_store):
    """Where a store lies with one file of the ledger, which has a tombstone and its proof."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("erased") / "store")))
    stores.index(store, ["well", "private"])
    erase(store, [PRIVATE], "run")
    rewrite(store, "videos", store.pin().table("videos").files, lambda rows: rows)
    return store.uri


@pytest.fixture
def erased(tmp_path, erased_once):
    """A copy of it."""
    return Store.open(str(shutil.copytree(erased_once, tmp_path / "erased")))


@pytest.mark.parametrize("harm", [cut, flip_a_page])
def test_a_forgotten_video_does_not_come_back_with_a_repair(erased, harm):
    (ledger,) = files_of(erased, "videos")
    harm(Path(ledger))
    repaired = repair(erased, verify(erased.pin()), "run")
    assert repaired.tombstones == 1
    assert erased.forgotten() == {PRIVATE}
    stores.index(erased, ["well"], seed=1)
    stores.index(erased, ["private"], seed=2)
    assert live(erased) == {"well"}
    assert left_over(erased, 48.0) == [PRIVATE]  # what was erased is proved again
    assert erase(erased, [PRIVATE], "again").still_there == []
    with catalog.connect(erased.pin(("videos",)), ()) as con:
        kept = con.sql("FROM ledger_videos WHERE error_code = 'forgotten'").to_arrow_table().to_pylist()
    assert {(row["etag"], row["size_bytes"], row["source"]) for row in kept} == {("1", 9, "/videos")}


def test_a_tombstone_that_was_copied_and_never_committed_is_none(committed):
    (row,) = stores.deleted(["well"]).to_pylist()
    copied = [{**row, "error_code": "forgotten", "seq": 1}]
    tombstones.copy_tombstones(committed, pa.Table.from_pylist(copied, tables.VIDEOS))
    assert run_maintain(MaintainOrder(committed, repair=True)).repaired.tombstones == 0
    assert live(Store.open(committed)) == {"well", "other"}


def test_what_lifted_a_tombstone_still_holds_after_a_repair_that_did_not_lose_it(erased):
    (ledger,) = files_of(erased, "videos")
    erased.append("videos", stores.deleted(["private"]))
    cut(Path(ledger))
    assert repair(erased, verify(erased.pin()), "run").tombstones == 0
    assert erased.forgotten() == frozenset()


def test_a_damaged_copy_of_tombstones_is_told_and_made_again(erased):
    (copy,) = Path(erased.uri, "forgotten").iterdir()
    cut(copy)
    found = verify(erased.pin())
    assert list(found.damaged_files) == [str(copy)]
    repair(erased, found, "run")
    assert verify(erased.pin()).damaged_files == {}
    rows, _ = tombstones.read_copies(erased.uri)
    assert rows["video_id"].to_pylist().count(PRIVATE) > 0


@pytest.fixture
def misstated(erased):
    """The store with an answer in a file whose footer misstates it, so that the file is damaged and can be read."""
    erased.append("answers", pa.Table.from_pylist([ROWS["answers"] | {"write_id": "a-write"}], tables.ANSWERS))
    (damaged,) = map(Path, files_of(erased, "answers"))
    content = damaged.read_bytes()
    at = content.rindex(b"a-write")  # in the footer's statistics
    damaged.write_bytes(content[:at] + b"b" + content[at + 1 :])
    return erased


@pytest.fixture
def mistaken(misstated, monkeypatch):
    """Gives a function that maintains that store with a mistake of our own in the function of a name."""

    def a_mistake(*_):
        raise TypeError("a mistake")

    def mistaken(name):
        with monkeypatch.context() as patch:
            patch.setattr(f"longvlm.pipeline.store.{name}", a_mistake)
            with pytest.raises(TypeError, match="a mistake"):
                run_maintain(MaintainOrder(misstated.uri, repair=True))

    return mistaken


@pytest.mark.parametrize(
    "name",
    [
        "upkeep.verify._wrong_blobs",
        "upkeep.verify._check_statistics",
        "upkeep.repair.conformed",
        "upkeep.tombstones.conformed",
        "health.num_columns",
    ],
)
def test_a_mistake_of_our_own_is_no_damage_and_nothing_is_dropped_for_it(misstated, mistaken, name):
    before = misstated.pin()
    mistaken(name)
    assert misstated.pin() == before


def test_once_the_mistake_is_mended_the_damage_is_too(misstated, mistaken):
    mistaken("upkeep.repair.conformed")
    assert run_maintain(MaintainOrder(misstated.uri, repair=True)).repaired.rows_lost == {"answers": 0}
