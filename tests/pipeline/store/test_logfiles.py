import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from longvlm.pipeline.store import logfiles
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.logfiles import drop_damaged_checkpoint, log_damage
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


@pytest.fixture(scope="module")
def checkpointed_once(tmp_path_factory, empty_store):
    """Where a store lies whose runs have a checkpoint, at version 24, and two commits behind it."""
    store = Store.open(str(shutil.copytree(empty_store, tmp_path_factory.mktemp("checkpointed") / "store")))
    for number in range(26):
        store.append("runs", pa.Table.from_pylist([{"run_id": str(number)}], tables.RUNS))
    checkpoints = Path(store.uri, "runs", "_delta_log").glob("*.checkpoint.parquet")
    assert [path.name for path in checkpoints] == [f"{24:020}.checkpoint.parquet"]
    return store.uri


@pytest.fixture
def checkpointed(tmp_path, checkpointed_once):
    """A copy of it, and the folder of the log of its runs."""
    uri = str(shutil.copytree(checkpointed_once, tmp_path / "checkpointed"))
    return uri, Path(uri, "runs", "_delta_log")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "hurt", [Path.unlink, lambda path: path.write_bytes(b""), flip], ids=["lost", "empty", "rotten"]
)
def test_a_newest_checkpoint_that_is_not_whole_is_done_without(checkpointed, hurt):
    uri, log = checkpointed
    hurt(log / f"{24:020}.checkpoint.parquet")
    opened = Store.open(uri)
    assert len(opened.pin().table("runs").files) == 26
    opened.append("runs", pa.Table.from_pylist([{"run_id": "new"}], tables.RUNS))
    assert len(Store.open(uri).pin().table("runs").files) == 27


def test_without_the_commits_before_it_the_sentence_says_what_is_lost(checkpointed):
    uri, log = checkpointed
    (log / f"{24:020}.checkpoint.parquet").write_bytes(b"")
    (log / f"{3:020}.json").unlink()
    with pytest.raises(
        InputError, match=r"the newest checkpoint of .* is lost or damaged, and the commits before it are"
    ):
        Store.open(uri).pin()


def test_a_log_that_is_whole_stays_as_it_is(checkpointed):
    _, log = checkpointed
    before = sorted(path.name for path in log.iterdir())
    assert not drop_damaged_checkpoint(str(log))
    assert sorted(path.name for path in log.iterdir()) == before
    assert log_damage(str(log)) == {}


def test_commits_with_holes_are_named(checkpointed):
    _, log = checkpointed
    names = {version: f"{version:020}.json" for version in (5, 25, 26)}
    for name in names.values():
        (log / name).write_bytes(b"")  # what came before the checkpoint is not read any more
    assert log_damage(str(log)) == {
        str(log / names[version]): "the commit is empty, and what it added is not part of the store"
        for version in (25, 26)
    }
    (log / names[25]).write_bytes(b"\0" * 100)
    assert "no JSON" in log_damage(str(log))[str(log / names[25])]
    (log / names[25]).unlink()
    assert "is missing" in log_damage(str(log))[str(log / names[25])]


def test_in_a_bucket_too(s3, checkpointed_once):
    for path in Path(checkpointed_once).rglob("_delta_log/*"):
        s3.upload_file(str(path), "bucket", f"index/{path.relative_to(checkpointed_once)}")
    s3.put_object(Bucket="bucket", Key=f"index/runs/_delta_log/{24:020}.checkpoint.parquet", Body=b"")
    assert len(Store.open("s3://bucket/index").pin().table("runs").files) == 26
    assert json.loads(
        s3.get_object(Bucket="bucket", Key=f"index/runs/_delta_log/{24:020}.json")["Body"].read().split()[0]
    )


def test_a_commit_that_one_listing_leaves_out_is_not_missing(checkpointed, monkeypatch):
    uri, log = checkpointed
    Store(uri).append("runs", pa.Table.from_pylist([{"run_id": "newest"}], tables.RUNS))
    listed = logfiles._listed
    left_out = iter([{f"{25:020}.json"}, set()])  # of the first listing, and of the second
    monkeypatch.setattr(logfiles, "_listed", lambda uri: listed(uri) - next(left_out))
    assert log_damage(str(log)) == {}
