from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot


def test_files_are_found_by_the_range_of_their_write_ids():
    files = (
        DataFile("one", 1, 1, "10", "19"),
        DataFile("two", 1, 1, "15", "25"),
        DataFile("three", 1, 1, "30", "30"),
        DataFile("empty", 1, 0),
    )
    snapshot = Snapshot({"tokens": PinnedTable(3, files)})
    assert [file.uri for file in snapshot.files_for("tokens", ["30", "12"])] == ["one", "three"]
    assert [file.uri for file in snapshot.files_for("tokens", ["19"])] == ["one", "two"]
    assert snapshot.files_for("tokens", ["26", "09", "31"]) == []
    assert snapshot.files_for("tokens", []) == []


def test_a_table_that_was_not_pinned_has_no_files():
    assert Snapshot().files_for("segments", ["1"]) == []
