"""How runs end: what is finished stays finished and is told, whatever becomes of the tidying afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import stores
from click.testing import CliRunner

from longvlm.jobs.cli import main
from longvlm.jobs.runs import close_run
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store


@pytest.fixture
def store(tmp_path, indexed):
    """A store in whose folder index.duckdb cannot be replaced."""
    made = tmp_path / "store"
    shutil.copytree(indexed, made)
    (made / "index.duckdb").unlink()
    (made / "index.duckdb" / "somebody's").mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    "command",
    [
        ["index", "{clips}", "--restale"],
        ["answer", "--ask", "Is it red?", "--type", "bool", "--limit", "1", "--precision", "float32"],
        ["nightly", "{clips}"],
        ["maintain"],
        ["maintain", "--verify"],
        ["forget", "--yes", "--uri", "{clips}/clip-00.mp4"],
        ["recipe", "promote", "tiny"],
    ],
    ids=" ".join,
)
def test_a_finished_run_is_told_even_where_index_duckdb_cannot_be_written(store, clips, command):
    args = [*(word.format(clips=clips) for word in command), "--store", str(store)]
    as_json = [] if command[0] == "recipe" else ["--json"]
    done = CliRunner().invoke(main, [*args, *as_json])
    assert done.exit_code == 0, done.output
    assert "index.duckdb was left as it was" in done.stderr
    if as_json:
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["stopped"] is None
        with catalog.connect(Store.open(str(store)).pin(("runs",))) as con:
            (newest,) = con.execute("SELECT counts FROM runs ORDER BY seq DESC LIMIT 1").fetchone()
        assert json.loads(newest)["run_id"] == told["run_id"]


def test_small_files_that_cannot_be_merged_are_a_note(tmp_path, monkeypatch):
    store = Store.create(str(tmp_path / "store"))
    store.register_recipe(stores.LONG, "model")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longvlm.jobs.runs.merge_small_files", full)
    report = SimpleNamespace(run_id="r", wall_s=1.0, stages={}, stopped=None, notes=[], as_json=dict)
    close_run(store, "index", report)
    (note,) = report.notes
    assert note.startswith("small files were not merged: No space left on device: free some space on that disk")
    assert Path(store.uri, "index.duckdb").is_file()


@pytest.mark.parametrize("most_bytes", [1, 20_000, 60_000])
def test_a_disk_that_is_full_for_index_duckdb_is_named_and_nothing_of_the_draft_stays(tmp_path, indexed, most_bytes):
    shutil.copytree(indexed, tmp_path / "store")
    (tmp_path / "store" / "index.duckdb").unlink()
    code = f"""
import resource
from longvlm.jobs.runs import refresh_index
from longvlm.pipeline.store.ledger import Store
store, notes = Store.open({str(tmp_path / "store")!r}), []
resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}))
refresh_index(store, notes)
print(*notes)
"""
    before = sorted((tmp_path / "store").iterdir())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("index.duckdb was left as it was: File too large (")
    assert "ulimit -f" in done.stdout
    assert sorted((tmp_path / "store").iterdir()) == before
