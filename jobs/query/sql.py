"""SQL over a store, sealed: a query reads the store and what is attached to it, and nothing else."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.names import match_questions
from longvlm.jobs.options import say
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.health import damaged_files, without
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.pipeline.text_files import UserFile, read_lines
from longvlm.pipeline.visible import is_utf8
from longvlm.schemas.errors import InputError
from longvlm.schemas.sql_text import quoted


def run_sql(store_uri: str, query: str, attach: Iterable[str] = ()) -> pa.Table:
    """The result of one SELECT over the views of a store as it is now.

    Args:
        store_uri: a local or remote store.
        query: one SELECT statement.
        attach: files that it may read too, each as NAME=FILE; see `access.attach`.

    Raises:
        InputError: there is no such store, a file cannot be attached, or the query cannot run.
    """
    with sealed_store(store_uri, attach) as con:
        return catalog.query(con, query)


@contextmanager
def sealed_store(
    store_uri: str, attach: Iterable[str] = (), made: Mapping[str, str] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to the views of a store as it is now, which reads that and what is attached; as `run_sql`.

    Args:
        store_uri: a local or remote store.
        attach: as of `run_sql`.
        made: parquet files, by the views that they stand for: what these hold was computed before.
    """
    doing(f"reading the store {store_uri}")
    snapshot, made = without_damaged(Store.open(store_uri).pin()), made or {}
    with catalog.connect(snapshot, apart=True) as con:
        for view, path in made.items():
            con.execute(f"CREATE OR REPLACE VIEW {view} AS FROM read_parquet({quoted(path)})")
        access.seal(con, snapshot, [*access.attach(con, attach), *made.values()])
        doing("running the query")
        yield con


def without_damaged(snapshot: Snapshot) -> Snapshot:
    """A snapshot without the files that are damaged, of which stderr is told: what is in the others can be asked."""
    damaged = damaged_files(snapshot)
    for uri, why in damaged.items():
        say(f"longvlm: {uri} is damaged ({why}) and left out; `longvlm maintain --verify` says what it held.", err=True)
    return without(snapshot, damaged) if damaged else snapshot


def read_script(query: str | None, file: str | None) -> str:
    """The SQL that a command line asks for: the query or the file, or else standard input.

    Raises:
        InputError: both are given, or what is named cannot be read.
    """
    if query is not None and file is not None:
        raise InputError("the statements come from QUERY or from --file; leave one of them out.")
    if query is not None:
        return query
    if file is not None and file != "-":
        return "".join(read_lines(UserFile(file, "file of SQL")))
    if sys.stdin is None:
        raise InputError("there is no query, and standard input is closed; give a QUERY or --file.")
    if sys.stdin.isatty():
        say("longvlm: reading SQL from the keyboard; end with Ctrl-D.", err=True)
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text; save it as UTF-8, or give its name to --file.") from error


def bind_script(con: duckdb.DuckDBPyConnection, script: str) -> list[tuple[str, duckdb.DuckDBPyRelation]]:
    """The statements of a script, each bound but not run, with what sentences call it.

    DuckDB takes the script apart, and each statement is checked by itself once more before DuckDB sees it again.

    Raises:
        QueryError: a statement is wrong.
        InputError: a statement would change something, or there is none.
    """
    if not is_utf8(script):
        raise InputError("the query is not UTF-8 text; type it again, or put it into a file and name that with -f.")
    with catalog.queries_as_sentences():
        found = con.extract_statements(script)
    if not found:
        raise InputError("there is no statement in the query; write a SELECT.")
    names = [f"statement {place}" if len(found) > 1 else "the query" for place in range(1, len(found) + 1)]
    for name, statement in zip(names, found, strict=True):
        if statement.type != duckdb.StatementType.SELECT:
            pivot = " A PIVOT has to name its values: ON a IN (...)." * (statement.type == duckdb.StatementType.MULTI)
            raise InputError(
                f"{name} must be one SELECT statement; a store is changed only by its own jobs. Nothing was run.{pivot}"
            )
    bound = []
    for name, statement in zip(names, found, strict=True):
        with catalog.queries_as_sentences(name):
            bound.append((name, catalog.select(con, statement.query)))
    return bound


def find_live(snapshot: Snapshot, video: str) -> tuple[str, str]:
    """The uri and write_id of the live video that a name means: its uri, external_id, path, file name or stem.

    Of a video that is live under several recipes it is the write that the views show.

    Raises:
        InputError: no live video answers to the name, or several do.
    """
    asked = Snapshot({"videos": snapshot.table("videos"), "recipes": snapshot.table("recipes")})
    with catalog.connect(asked, ("videos",)) as con:
        con.register("asked", pa.table({"q": [0], "question": [f"the tokens of {video}"], "video": [video]}))
        con.execute(_SHOWN)
        found = match_questions(con, "asked", "shown")
        if not len(found):
            raise InputError(f"no live video is called {video!r}; the view videos of the store has their uris.")
        (row,) = con.execute("SELECT uri, write_id FROM shown WHERE n = ?", [found["n"][0].as_py()]).fetchall()
    return row


_SHOWN = """
CREATE TEMP TABLE shown AS
SELECT row_number() OVER (ORDER BY write_id)::INTEGER AS n, uri, external_id, write_id
FROM videos WHERE status = 'indexed'
"""
