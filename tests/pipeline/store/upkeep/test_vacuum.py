import os
import time
from pathlib import Path

import pytest
import stores

from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.shards import read_tokens, write_shards
from longvlm.pipeline.store.upkeep import vacuum as vacuum_module
from longvlm.pipeline.store.upkeep.compact import merge_small_files
from longvlm.pipeline.store.upkeep.vacuum import vacuum

NOTHING = {"files": 0, "bytes": 0, "uploads": 0, "drafts": 0}


def age(path, hours):
    before = time.time() - hours * 3600
    os.utime(path, (before, before))


def versions(store):
    return {name: table.version for name, table in store.pin().tables.items()}


@pytest.mark.usefixtures("few_are_merged")
def test_replaced_files_go_after_the_retention_and_nothing_is_noted_in_the_log(store):
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    merge_small_files(store)
    before = versions(store)
    assert vacuum(store, 48) == NOTHING
    swept = vacuum(store, 0)
    assert (swept["files"], swept["bytes"] > 0) == (6, True)
    assert vacuum(store, 0) == NOTHING
    assert versions(store) == before
    assert len(list(Path(store.uri, "segments").glob("*.parquet"))) == 1


def test_a_shard_that_waits_to_be_committed_is_left_and_one_of_a_dead_run_is_not(store):
    stores.index(store, ["v0"])
    made = stores.encoded(["waits"])
    waiting = write_shards(store.uri, made, stores.LONG.fingerprint)
    dead = write_shards(store.uri, stores.encoded(["dead"]), stores.LONG.fingerprint)
    for table in ("tokens", "segments"):
        age(Path(store.uri, table, dead[f"{table}_shard"][0].as_py()["path"]), hours=49)
    assert vacuum(store, 48)["files"] == 2
    store.commit(waiting, stores.videos(waiting, ["waits"], stores.LONG.fingerprint))
    assert read_tokens(store.pin(), made["write_id"].to_pylist()).num_rows == 4


def test_drafts_of_dead_processes_go(store):
    old, young = Path(store.uri, ".index-old.duckdb"), Path(store.uri, ".index-young.duckdb")
    for path in (old, young):
        path.touch()
    sample = Path(store.uri, ".sample-of-a-dry-run")
    (sample / "videos").mkdir(parents=True)
    for path in (old, sample):
        age(path, hours=49)
    assert vacuum(store, 48)["drafts"] == 2
    assert not sample.exists()
    assert young.exists()


def test_entries_of_the_log_that_were_never_made_go(store):
    old, young = (Path(store.uri, "tokens", "_delta_log", f"_commit_{name}.json.tmp") for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    age(old, hours=49)
    vacuum(store, 48)
    assert not old.exists()
    assert young.exists()


@pytest.mark.usefixtures("few_are_merged")
def test_two_may_vacuum_at_once(store, monkeypatch):
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    merge_small_files(store)
    plain = vacuum_module.unreferenced

    def found_and_taken(store, table, hours, **how):
        found = plain(store, table, hours, **how)
        for path in found:
            Path(store.uri, table, path).unlink()
        return found

    monkeypatch.setattr(vacuum_module, "unreferenced", found_and_taken)
    assert vacuum(store, 0)["files"] == 0


@pytest.mark.usefixtures("few_are_merged")
def test_buckets_are_swept_too_with_uploads_that_were_cut_off(s3):
    store = Store.create("s3://bucket/index")
    for number in range(3):
        stores.index(store, [f"v{number}"], seed=number)
    merge_small_files(store)
    assert vacuum(store, 48) == NOTHING
    for key in ("index/tokens/cut.parquet", "index-of-another/x"):
        s3.create_multipart_upload(Bucket="bucket", Key=key)  # the server says of all that they began in 2010
    swept = vacuum(store, 0)
    assert (swept["files"], swept["uploads"]) == (6, 1)
    left = s3.list_multipart_uploads(Bucket="bucket")["Uploads"]
    assert [upload["Key"] for upload in left] == ["index-of-another/x"]
    assert stores.newest(store).num_rows == 3
