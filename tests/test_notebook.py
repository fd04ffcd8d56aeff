"""The notebook of docs/, run in a kernel of its own on a store with answers in it."""

import nbformat
import pyarrow as pa
import pytest
import stores
from nbclient import NotebookClient

from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from support import ROOT

NOTEBOOK = ROOT / "docs" / "analyst.ipynb"


@pytest.fixture
def store(tmp_path) -> Store:
    """Six live videos, all asked whether anybody falls, one of them more."""
    made = Store.create(str(tmp_path / "store"))
    made.register_recipe(stores.LONG, "some/model")
    names = [f"v{i}" for i in range(6)]
    write_ids = stores.index(made, names)["write_id"].to_pylist()
    rows = [
        {
            "video_id": stores.video_id(stores.uri_of(name)),
            "write_id": write_id,
            "question_id": "falls",
            "question": "Does anybody fall?",
            "question_hash": "h",
            "type": "bool",
            "answer": "Yes" if i % 3 else "No",
            "value": "true" if i % 3 else "false",
            "status": "answered" if i else "unparsed",
            "confidence": 0.9,
            "answer_recipe": "r",
            "model": "m",
            "run_id": "1",
            "created_at": 1,
        }
        for i, (name, write_id) in enumerate(zip(names, write_ids, strict=True))
    ]
    other = {**rows[0], "question_id": "what", "question": "What is it?", "question_hash": "h2", "type": "text"}
    made.append("answers", pa.Table.from_pylist([*rows, other], tables.ANSWERS))
    return made


def test_every_cell_runs_and_the_last_one_draws(store, tmp_path, monkeypatch):
    monkeypatch.setenv("LONGVLM_STORE", store.uri)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "Does anybody fall?" in shown["asked"][-1].data["text/plain"]
    assert "true" in shown["joined"][-1].data["text/plain"]
    assert any("image/png" in output.get("data", {}) for output in shown["plot"])


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
