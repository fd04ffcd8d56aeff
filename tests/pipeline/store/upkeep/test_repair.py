from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from pyarrow import parquet

from longvlm.jobs.operate.maintain import MaintainOrder, run_maintain
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import write_pieces
from longvlm.pipeline.store.upkeep import tombstones
from longvlm.pipeline.store.upkeep.compact import rewrite
from longvlm.pipeline.store.upkeep.erase import erase, left_over
from longvlm.pipeline.store.upkeep.repair import repair
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas import tables
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
    "videos": None,
    "answers": {"question": "?"},
    "verdicts": {"judge": "exact#1"},
    "recipes": {"event": "registered", "recipe": "r", "name": "n", "spec": "{}", "model": "m"},
    "runs": {"run_id": "r", "job": "index", "counts": "{}"},
}


@pytest.mark.parametrize(
    ("table", "harm"),
    [*product(ROWS, (cut, flip_a_page)), *product(["videos"], (flip_the_footer, empty, Path.unlink))],
)
def test_a_damaged_file_of_any_table_is_repaired_and_the_store_is_whole(store, table, harm):
    stores.index(store, ["well"])
    before = {file.uri for file in store.pin().table(table).files}
    if table == "videos":
        stores.index(store, ["lost"], seed=1)
    else:
        store.append(table, pa.Table.from_pylist([ROWS[table]], tables.TABLES[table]))
    (damaged,) = (file.uri for file in store.pin().table(table).files if file.uri not in before)
    harm(Path(damaged))
    found = verify(store.pin())
    assert list(found.damaged_files) == [damaged]
    repaired = repair(store, found, "run")
    assert repaired.rows_lost == {table: 1}
    again = verify(store.pin())
    assert (again.damaged_files, again.problems, again.num_videos) == ({}, [], 1)
    assert live(store) == {"well"}
    stores.index(store, ["lost"], seed=2)  # as the next run does, to which it is new
    assert live(store) == {"well", "lost"}


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


def forgotten_store(store, harm):
    """A store whose one file of the ledger, with a tombstone and its proof, is damaged; returns who was forgotten."""
    stores.index(store, ["well", "private"])
    private = video_id(stores.uri_of("private"))
    erase(store, [private], "run")
    files = store.pin().table("videos").files
    rewrite(store, "videos", files, lambda rows: rows)
    (file,) = store.pin().table("videos").files
    harm(Path(file.uri))
    return private


@pytest.mark.parametrize("harm", [cut, flip_a_page])
def test_a_forgotten_video_does_not_come_back_with_a_repair(store, harm):
    private = forgotten_store(store, harm)
    repaired = repair(store, verify(store.pin()), "run")
    assert repaired.tombstones == 1
    assert store.forgotten() == {private}
    stores.index(store, ["well"], seed=1)
    stores.index(store, ["private"], seed=2)
    assert live(store) == {"well"}
    assert left_over(store, 48.0) == [private]  # what was erased is proved again
    assert erase(store, [private], "again").still_there == []
    with catalog.connect(store.pin()) as con:
        kept = con.sql("FROM ledger_videos WHERE error_code = 'forgotten'").to_arrow_table().to_pylist()
    assert {(row["etag"], row["size_bytes"], row["source"]) for row in kept} == {("1", 9, "/videos")}


def test_what_lifted_a_tombstone_still_holds_after_a_repair_that_did_not_lose_it(store):
    stores.index(store, ["private"])
    private = video_id(stores.uri_of("private"))
    erase(store, [private], "run")
    files = store.pin().table("videos").files
    rewrite(store, "videos", files, lambda rows: rows)
    (file,) = store.pin().table("videos").files
    store.append("videos", stores.deleted(["private"]))
    cut(Path(file.uri))
    assert repair(store, verify(store.pin()), "run").tombstones == 0
    assert store.forgotten() == frozenset()


def test_a_damaged_copy_of_tombstones_is_told_and_made_again(store):
    stores.index(store, ["private"])
    erase(store, [video_id(stores.uri_of("private"))], "run")
    (copy,) = Path(store.uri, "forgotten").iterdir()
    cut(copy)
    found = verify(store.pin())
    assert list(found.damaged_files) == [str(copy)]
    repair(store, found, "run")
    assert verify(store.pin()).damaged_files == {}
    rows, _ = tombstones.read_copies(store.uri)
    assert rows["video_id"].to_pylist().count(video_id(stores.uri_of("private"))) > 0


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("upkeep.verify", "_wrong_blobs"),
        ("upkeep.verify", "_check_statistics"),
        ("upkeep.repair", "conformed"),
        ("upkeep.tombstones", "conformed"),
        ("health", "num_columns"),
    ],
)
def test_a_mistake_of_our_own_is_no_damage_and_nothing_is_dropped_for_it(store, monkeypatch, owner, name):
    stores.index(store, ["well", "private"])
    erase(store, [video_id(stores.uri_of("private"))], "run")
    store.append("answers", pa.Table.from_pylist([ROWS["answers"] | {"write_id": "a-write"}], tables.ANSWERS))
    (damaged,) = (Path(file.uri) for file in store.pin().table("answers").files)
    content = damaged.read_bytes()
    at = content.rindex(b"a-write")  # in the footer's statistics: the row itself can be read
    damaged.write_bytes(content[:at] + b"b" + content[at + 1 :])
    before = store.pin()

    def mistaken(*_):
        raise TypeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(f"longvlm.pipeline.store.{owner}.{name}", mistaken)
        with pytest.raises(TypeError, match="a mistake"):
            run_maintain(MaintainOrder(store.uri, repair=True))
    assert store.pin() == before
    assert run_maintain(MaintainOrder(store.uri, repair=True)).repaired.rows_lost == {"answers": 0}
