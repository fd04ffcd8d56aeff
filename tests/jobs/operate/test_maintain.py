import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from stores import rows

from longvlm.jobs.cli import main
from longvlm.jobs.index.order import IndexOrder
from longvlm.jobs.index.run import run_index
from longvlm.jobs.operate import maintain
from longvlm.jobs.operate.forget import find_videos, run_forget
from longvlm.jobs.operate.maintain import MaintainOrder, maintain_store, run_maintain
from longvlm.pipeline.source.corpus import Source
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.upkeep.compact import rewrite
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import VIDEOS


@pytest.fixture
def store(tmp_path, indexed):
    shutil.copytree(indexed, tmp_path / "store")
    return str(tmp_path / "store")


def longvlm(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_a_store_is_verified_and_the_run_noted(store):
    done = longvlm("maintain", "--store", store, "--verify", "--json")
    assert done.exit_code == 0, done.output
    counts = json.loads(done.stdout.splitlines()[-1])
    assert (counts["verified_videos"], counts["damaged_files"], counts["problems"]) == (12, 0, 0)
    (noted,) = rows(store, "FROM runs WHERE job = 'maintain'")
    assert {"kind": "summary"} | json.loads(noted["counts"]) == counts


def test_damage_is_told_by_video_and_repaired_by_the_next_run(store, clips):
    shard = next(Path(store, "tokens").glob("*.parquet"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = longvlm("maintain", "--store", store, "--verify", "--json")
    assert done.exit_code == 1
    *found, counts = map(json.loads, done.stdout.splitlines())
    assert counts["damaged_files"] == 1
    assert len(found) == 1 + counts["problems"] > 1
    assert [row["kind"] for row in [*found, counts]] == ["file", *["video"] * counts["problems"], "summary"]
    assert "damaged files: 1, things wrong with live videos: " in done.stderr
    spoken = longvlm("maintain", "--store", store, "--verify")
    assert f"damaged: {shard}" in spoken.stdout
    repaired = longvlm("maintain", "--store", store, "--repair", "--json")
    assert repaired.exit_code == 0, repaired.output
    assert json.loads(repaired.stdout.splitlines()[-1])["repaired"] == counts["problems"]
    again = run_index(IndexOrder(Source(str(clips)), store))
    assert again.counts.indexed == counts["problems"]
    assert longvlm("maintain", "--store", store, "--verify").exit_code == 0


def test_where_nothing_is_to_be_done_nothing_is_written(store):
    opened = Store.open(store)
    before = {name: table.version for name, table in opened.pin().tables.items()}
    report = maintain_store(opened)
    assert (report.dead_writes, sum(report.files_fewer.values()), report.swept["files"]) == (0, 0, 0)
    assert {name: table.version for name, table in opened.pin().tables.items()} == before


def test_a_short_retention_and_a_store_that_is_not_there_are_sentences(store, tmp_path):
    with pytest.raises(InputError, match=r"retention of 2 hours is not possible: under 48 "):
        run_maintain(MaintainOrder(store, 2))
    with pytest.raises(InputError, match="there is no store"):
        run_maintain(MaintainOrder(str(tmp_path / "nowhere")))


def test_what_was_committed_of_a_forgotten_video_since_is_erased(store, monkeypatch):
    opened = Store.open(store)
    (video,) = rows(store, "SELECT * EXCLUDE (outdated) FROM live_videos ORDER BY uri LIMIT 1")
    run_forget(find_videos(store, [video["uri"]]))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "forgotten", lambda *_: frozenset())
        opened.append("videos", pa.Table.from_pylist([video], VIDEOS))  # by a writer that knows no tombstones
    report = maintain_store(opened)
    assert report.as_json()["erased_videos"] == 1
    assert maintain_store(opened).erased is None
    assert not rows(store, f"FROM ledger_videos WHERE uri = '{video['uri']}'")


def before_each(monkeypatch, acts):
    """Let something happen between the look at the logs and that at the files, each time one thing more."""
    plain = maintain.verify

    def verify(snapshot, progress):
        if acts:
            acts.pop()()
        return plain(snapshot, progress)

    monkeypatch.setattr(maintain, "verify", verify)


def test_files_that_a_forget_replaces_while_they_are_verified_are_no_damage(store, monkeypatch):
    before = [row["uri"] for row in rows(store, "SELECT uri FROM live_videos ORDER BY uri")]
    before_each(monkeypatch, [lambda: run_forget(find_videos(store, before[:1]))])
    report = run_maintain(MaintainOrder(store, repair=True))
    assert report.verified.damaged_files == {}
    assert (report.verified.problems, report.repaired.videos, report.stopped) == ([], 0, None)
    assert [row["uri"] for row in rows(store, "SELECT uri FROM live_videos ORDER BY uri")] == before[1:]


def test_a_store_whose_files_keep_being_replaced_is_not_judged(store, monkeypatch):
    before = rows(store, "FROM live_videos ORDER BY uri")

    def replace():
        """As a forget does, and at once."""
        opened = Store.open(store)
        files = opened.pin(("tokens",)).table("tokens").files
        rewrite(opened, "tokens", files, lambda rows: rows)
        for file in files:
            Path(file.uri).unlink()

    before_each(monkeypatch, [replace] * 3)
    with pytest.raises(InputError, match=r"each of the 3 times .* verify it when they are done"):
        run_maintain(MaintainOrder(store, repair=True))
    assert rows(store, "FROM live_videos ORDER BY uri") == before
