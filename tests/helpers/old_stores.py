"""The store that version 0.1.0 made (tests/data/store_0_1_0), and tables as a version to come might have them."""

import json
import shutil
from pathlib import Path

import pyarrow as pa

from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from support import ROOT

DATA = ROOT / "tests" / "data" / "store_0_1_0"
FACTS = json.loads((DATA / "facts.json").read_text())
ADDED = pa.field("added", pa.list_(pa.struct([("at_s", pa.float64()), ("word", pa.string())])))
WORDS = [{"at_s": 1.5, "word": "new"}]


def copy_of_old(folder: Path) -> Store:
    """The old store, to be written to."""
    shutil.copytree(DATA / "store", folder / "old")
    return Store.open(str(folder / "old"))


def add_a_column(patch) -> None:
    """Let every table have one more column, of a nested type, which encoders fill in for each segment."""
    for name, schema in list(tables.TABLES.items()):
        wider = schema.append(ADDED)
        patch.setitem(tables.TABLES, name, wider)
        patch.setattr(tables, name.upper(), wider)
    segments = tables.ENCODED.get_field_index("segments")
    encoded = tables.ENCODED.set(segments, pa.field("segments", pa.list_(pa.struct([*tables.ENCODED_SEGMENT, ADDED]))))
    patch.setattr(tables, "ENCODED", encoded)


def metadata_commits(store: Store, table: str) -> int:
    """How often the log says what columns a table has; the first time when it was made."""
    log = sorted(Path(store.uri, table, "_delta_log").glob("*.json"))
    return sum('{"metaData"' in entry.read_text() for entry in log)


def add_a_column_at_once(uri: str, start) -> None:
    """What a writer of a process of its own does, when the others are ready to do so too."""
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        add_a_column(patch)
        store = Store.open(uri)
        rows = pa.Table.from_pylist([{"run_id": "r", "job": "index", "added": WORDS}], tables.RUNS)
        start.wait()
        store.append("runs", rows)
