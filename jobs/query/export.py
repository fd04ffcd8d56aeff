"""Export of a store to one self-contained DuckDB file: tables instead of views, for people who take it elsewhere."""

import os
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from longvlm.jobs.cluster.activity import doing
from longvlm.pipeline.source.scratch import draft_file
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.index_file import reachable
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import quoted

_TABLES = ("videos", "answers", "answers_wide", "verdicts", "scores", "failures", "runs", "recipes")
_LEDGERS = ("videos", "answers", "verdicts", "runs", "recipes")  # what these are made of
_MEMORY_GB = 2.0  # of DuckDB's; rows stream, only the newest of each video has to be found, and more goes to disk


@dataclass
class ExportReport:
    """The report of an export."""

    path: str
    size_bytes: int = 0
    rows: dict[str, int] = field(default_factory=dict)  # by table

    def as_json(self) -> dict[str, Any]:
        """The object that `longvlm export --json` prints."""
        return {"path": self.path, "size_bytes": self.size_bytes, "rows": self.rows}


def export_store(store_uri: str, target: str, *, segments: bool = False, force: bool = False) -> ExportReport:
    """Export what the views show to one DuckDB file; it appears whole or not at all.

    Args:
        store_uri: a local or remote store.
        target: where the file goes, a path ending in .duckdb outside the store.
        segments: take along the segments with their embeddings, as FLOAT[n] where all are of one width.
        force: replace a file that is there.

    Raises:
        InputError: there is no such store, the target cannot be written or is there already, or the disk is full.
    """
    store = Store.open(store_uri)
    path = _target(target, store.uri, force=force)
    report = ExportReport(str(path))
    draft = path.with_name(f".export-{uuid.uuid4()}.duckdb")
    try:
        with draft_file(draft):
            _write(draft, store.pin((*_LEDGERS, "segments") if segments else _LEDGERS), report, segments=segments)
            report.size_bytes = draft.stat().st_size
            os.replace(draft, path)  # noqa: PTH105 - says best what it does
    except (duckdb.IOException, duckdb.OutOfMemoryException, OSError) as error:
        raise InputError(f"{path} cannot be written: {catalog.first_line(error)}; nothing was changed.") from error
    return report


def _write(draft: Path, pinned: Snapshot, report: ExportReport, *, segments: bool) -> None:
    """Copy what the views show into a new file."""
    with catalog.connect(pinned, apart=True) as con, reachable(draft) as taken:
        con.execute(f"SET memory_limit = '{_MEMORY_GB}GB'")
        con.execute(f"SET temp_directory = {quoted(f'{tempfile.gettempdir()}/longvlm-export-{uuid.uuid4()}')}")
        con.execute("SET preserve_insertion_order = false")  # would hold rows back
        # the storage version lets older DuckDBs open the file
        con.execute(f"ATTACH {quoted(taken)} AS taken (STORAGE_VERSION 'v1.0.0')")
        for name in _TABLES:
            doing(f"copying {name}")
            report.rows[name] = _copy(con, name, "*")
        if segments:
            doing("copying segments")
            report.rows["segments"] = _copy(con, "segments", _segment_columns(con))
        con.execute("DETACH taken")


def _target(target: str, store_uri: str, *, force: bool) -> Path:
    """The path to write, once it is one that may be written."""
    if not is_local(target):
        raise InputError(f"--to {target} is not on this machine; write the file here and copy it there.")
    path = Path(target.removeprefix("file://")).expanduser().absolute()
    if path.suffix != ".duckdb":
        raise InputError(f"--to {target} must end in .duckdb; other forms can be made from that file.")
    if not path.parent.is_dir():
        raise InputError(f"--to {target}: there is no folder {path.parent}; make it first.")
    if is_local(store_uri) and path.resolve().is_relative_to(Path(store_uri).resolve()):
        raise InputError(f"--to {target} lies in the store, which only its own jobs write; choose another place.")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"{target} is there already; choose another name, or replace a file with --force.")
    return path


def _copy(con: duckdb.DuckDBPyConnection, name: str, columns: str) -> int:
    """Make a table of a view; returns its number of rows."""
    ((copied,),) = con.execute(f"CREATE TABLE taken.main.{name} AS SELECT {columns} FROM memory.main.{name}").fetchall()
    return int(copied)


def _segment_columns(con: duckdb.DuckDBPyConnection) -> str:
    """All columns of the segments; the embedding as an array of fixed size, which similarity functions want."""
    widths = con.execute("SELECT DISTINCT len(embedding) FROM segments WHERE embedding IS NOT NULL LIMIT 2").fetchall()
    return f"* REPLACE (embedding::FLOAT[{widths[0][0]}] AS embedding)" if len(widths) == 1 else "*"
