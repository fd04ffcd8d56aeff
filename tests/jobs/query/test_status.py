import json
from types import SimpleNamespace

import pytest
import stores
from click.testing import CliRunner

from longvlm.jobs.cli import main
from longvlm.jobs.query.status import describe_store, list_runs
from longvlm.jobs.runs import record_run
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.errors import InputError


@pytest.fixture
def store(tmp_path):
    made = Store.create(str(tmp_path / "store"))
    parts = {"index": {"indexed": 1, "stopped": "disk full"}, "answer": {"answered": 2, "stopped": None}}
    for job, run_id, wall_s, counts in (
        ("index", "r1", 2.0, {"indexed": 3, "stopped": None}),
        ("answer", "r2", 1.0, {"answered": 3, "stopped": "interrupted"}),
        ("nightly", "r3", 9.0, parts),
    ):
        report = SimpleNamespace(run_id=run_id, wall_s=wall_s, stages={}, as_json=lambda counts=counts: counts)
        record_run(made, job, report)
    return made


def test_runs_are_listed_newest_first_and_say_why_they_stopped(store):
    runs = list_runs(store.uri, 20)
    assert [(run["job"], run["run_id"], run["stopped"]) for run in runs] == [
        ("nightly", "r3", "disk full"),
        ("answer", "r2", "interrupted"),
        ("index", "r1", None),
    ]
    assert runs[0]["counts"]["answer"] == {"answered": 2, "stopped": None}
    assert [run["run_id"] for run in list_runs(store.uri, 2)] == ["r3", "r2"]
    with pytest.raises(InputError, match="no store"):
        list_runs(store.uri + "-not", 1)


def test_a_store_is_described_with_its_last_run(store):
    store.register_recipe(stores.LONG, "model")
    stores.index(store, ["a", "b"])
    described = describe_store(store.uri)
    assert described["videos"] == {"indexed": 2}
    assert described["segments"] == 8
    assert described["last_run"]["run_id"] == "r3"


def test_status_prints_runs_for_people_and_machines(store):
    def shown(*words):
        said = CliRunner().invoke(main, ["status", "--store", store.uri, *words])
        assert said.exit_code == 0, said.output
        return said.stdout.splitlines()

    assert len(shown("--runs")) == 3
    (newest,) = shown("--runs", "1")
    assert "nightly" in newest
    assert "stopped: disk full; index: indexed 1; answer: answered 2" in newest
    assert [json.loads(line)["run_id"] for line in shown("--runs", "--json")] == ["r3", "r2", "r1"]
