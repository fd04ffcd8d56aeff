"""DuckDB over a pinned snapshot: connections with the views of `schemas/views.sql`."""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.resources import files
from threading import Lock
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
from duckdb import DuckDBPyConnection

from longvlm.pipeline.store.files import num_columns
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas import sql_text
from longvlm.schemas.errors import InputError, QueryError
from longvlm.schemas.sql_text import quoted
from longvlm.schemas.tables import TABLES

# Columns of the view answers_wide at most, those with the most answers. Standing questions, asked of every video, are
# some dozens; a benchmark's file may bring 100,000 ids, each for a video of its own, and every connection binds them.
MAX_WIDE_COLUMNS = 1000

_MAKING_VIEWS = Lock()

VIEWS_SQL = (files("longvlm.schemas") / "views.sql").read_text()
_CREATE = re.compile(r"^CREATE (?:VIEW|MACRO) (\w+).*?;$", re.MULTILINE | re.DOTALL)
_READS, _NAMED_WITHIN = re.compile(r"\b(?:FROM|JOIN) (\w+)"), re.compile(r"^(?:WITH )?(\w+) AS \($", re.MULTILINE)
# By name what a view, or a macro, reads; each stands behind all that it reads.
_STANDS_ON = {
    view[1]: {*_READS.findall(view[0])} - {*_NAMED_WITHIN.findall(view[0])} for view in _CREATE.finditer(VIEWS_SQL)
}

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",  # what the views need (parquet, json) is built in
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",  # a query must not see the variables of this program
    "validate_external_file_cache": "NO_VALIDATION",  # a shard never changes once it is named
}
# By these a query passes over row groups for what a footer says of them.
_LOOKING_AT_ALL = {
    "disabled_optimizers": "filter_pushdown,join_filter_pushdown,statistics_propagation,row_group_pruner,"
    "partial_aggregate_pushdown"
}
_SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.timestamp("us"): "TIMESTAMP",
}


def connect(
    snapshot: Snapshot, views: Collection[str] | None = None, *, apart: bool = False, trusts_footers: bool = True
) -> DuckDBPyConnection:
    """A connection with views on a snapshot's tables; no extension is ever downloaded.

    Args:
        snapshot: from `Store.pin`.
        views: those that are needed beside the tables themselves, `ledger_` and their name; by default all that stand
            on them. Each takes its time, most of all answers_wide, which looks through all answers.
        apart: in a database of its own, for whoever changes its settings or lets somebody's own SQL in. Else, for this
            machine's files, it is that of all connections in this process, which has the views already; what is made in
            it has to be TEMP, as the tables of the snapshot are. One that the snapshot lacks raises when it is read.
        trusts_footers: whether queries may pass over row groups for what footers say of them, which have no checksums.

    Raises:
        InputError: a file that the snapshot names is gone or out of reach.
    """
    con = _connection(snapshot, apart=apart, trusts_footers=trusts_footers, has_views=True)
    if apart or _is_remote(snapshot):
        create_views(con, snapshot, views)
    else:
        with _files_as_named():
            _create_tables(con, snapshot, "CREATE TEMP")
            if views is None and {"answers", "recipes", "videos"} <= snapshot.tables.keys():
                con.execute(f"CREATE TEMP VIEW answers_wide AS {answers_wide(con)}")
    return con


def without_views(snapshot: Snapshot, *, apart: bool = False) -> DuckDBPyConnection:
    """A connection that reaches the files of a snapshot, as `connect` makes its views in."""
    return _connection(snapshot, apart=apart, trusts_footers=True, has_views=False)


def _connection(snapshot: Snapshot, *, apart: bool, trusts_footers: bool, has_views: bool) -> DuckDBPyConnection:
    """One to a database of its own, or to that of the process, which has the views where they are asked for."""
    is_remote = _is_remote(snapshot)
    settings = _SETTINGS if trusts_footers else {**_SETTINGS, **_LOOKING_AT_ALL}
    own = apart or is_remote
    con = duckdb.connect(config=settings) if own else _of_process(trusts_footers=trusts_footers, has_views=has_views)
    con.execute("SET TimeZone = 'UTC'")  # as all times of a store are, wherever it is read
    if con.execute("SELECT current_setting('enable_progress_bar')").fetchall() == [(True,)]:
        con.execute("SET enable_progress_bar = false")  # a job has its own; in notebooks it may not even be set
    if is_remote:
        con.register_filesystem(_remote_filesystem(snapshot))
    return con


def _of_process(*, trusts_footers: bool, has_views: bool) -> DuckDBPyConnection:
    try:
        con = _cursor(trusts_footers=trusts_footers, has_views=has_views)
        con.execute("SELECT 1")
    except duckdb.Error:  # one that broke takes no queries any more
        _database.cache_clear()
        con = _cursor(trusts_footers=trusts_footers, has_views=has_views)
    return con


def _cursor(*, trusts_footers: bool, has_views: bool) -> DuckDBPyConnection:
    database = _database(os.getpid(), trusts_footers=trusts_footers)
    if has_views:
        with _MAKING_VIEWS:  # one thread, once
            _create_shared_views(database)
    return database.cursor()


@lru_cache(2)
def _database(_pid: int, *, trusts_footers: bool) -> DuckDBPyConnection:
    """The database in memory of a process, for it takes longer to make than most queries run; none survives a fork.

    It keeps nothing of the files that it reads: it outlives many connections, and a file may be damaged meanwhile. So
    it is for this machine's files alone: of a bucket's each view that is bound would ask for them again.
    """
    settings = _SETTINGS if trusts_footers else {**_SETTINGS, **_LOOKING_AT_ALL}
    return duckdb.connect(config={**settings, "enable_external_file_cache": "false"})


@lru_cache(2)
def _create_shared_views(con: DuckDBPyConnection) -> None:
    """Make the views of a process's database, when a connection needs the first of them.

    They stand on tables that raise when they are read, until a connection has TEMP ones of the same names: DuckDB
    looks a view's tables up anew with each query, there first, and to make all views takes ten times as long.
    """
    for name, schema in TABLES.items():
        raises = f"error({quoted(f'ledger_{name} is not part of what this connection was given')})"
        columns = ", ".join(f'CAST({raises} AS {_sql_type(field.type)}) AS "{field.name}"' for field in schema)
        con.execute(f"CREATE VIEW ledger_{name} AS SELECT {columns} WHERE {raises} IS NULL")
    _create_stack(con, set(_STANDS_ON), {f"ledger_{name}" for name in TABLES}, "CREATE")


@lru_cache(16)
def recipe_rows(files: tuple[DataFile, ...]) -> list[tuple[Any, ...]]:
    """Rows of the view recipes over some files of its table: every job asks several times, and files do not change.

    Each has recipe, name, spec, model, active and registered_seq, and they come in the order of registration.
    """
    sql = "SELECT recipe, name, spec, model, active, registered_seq FROM recipes ORDER BY registered_seq, recipe"
    with connect(Snapshot({"recipes": PinnedTable(0, files)}), ("recipes",)) as con:
        return con.execute(sql).fetchall()


def query(con: DuckDBPyConnection, sql: str) -> pa.Table:
    """The result of one SELECT (or WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW).

    Raises:
        QueryError: it cannot run.
        InputError: it would change something, or is not one statement.
    """
    with queries_as_sentences():
        return select(con, sql).to_arrow_table()


def select(con: DuckDBPyConnection, sql: str) -> duckdb.DuckDBPyRelation:
    """One SELECT as a relation, bound and not run yet. Raises duckdb.Error if it is wrong, InputError as `query`."""
    check_select(con, sql)
    (statement,) = con.extract_statements(sql)
    text = statement.query.encode()
    ends = (offset for offset, kind in duckdb.tokenize(statement.query) if kind == duckdb.token_type.operator)
    end = next((offset for offset in ends if text[offset : offset + 1] == b";"), len(text))  # comments may follow
    try:
        return con.sql(text[:end].decode())  # without its end, for a relation stands in queries around it
    except duckdb.Error:
        con.execute(sql)  # is wrong in the same way before it runs, and says where
        raise


# What DuckDB tells of a page's damaged head is of no class of its own, and does not name the file.
_OF_A_PAGE = "A file of the store is damaged; `longvlm maintain --verify` says which."


@contextmanager
def queries_as_sentences(name: str = "the query") -> Iterator[None]:
    """Raise what DuckDB raises in the body as QueryError, which begins with the name."""
    try:
        yield
    except duckdb.Error as error:
        hint = f"\n{_OF_A_PAGE}" if type(error) is duckdb.Error else ""
        raise QueryError(f"{name} cannot run: {str(error).strip()}{hint}") from error


def check_select(con: DuckDBPyConnection, sql: str) -> None:
    """Raise InputError unless this is one SELECT, or duckdb.Error if it is no SQL at all."""
    if [statement.type for statement in con.extract_statements(sql)] != [duckdb.StatementType.SELECT]:
        raise InputError("the query must be one SELECT statement; a store is changed only by its own jobs.")


def without_place(error: duckdb.Error) -> str:
    """What DuckDB says of a query in one line, with what may have been meant, and not at which place in its text."""
    return " ".join(str(error).partition("\n\nLINE ")[0].split())


def first_line(error: Exception) -> str:
    """What an error says before it goes into detail."""
    return str(error).strip().partition("\n")[0]


def _folders(snapshot: Snapshot) -> set[str]:
    return {file.uri.rpartition("/")[0] for table in snapshot.tables.values() for file in table.files}


def _is_remote(snapshot: Snapshot) -> bool:
    return any(not is_local(folder) for folder in _folders(snapshot))


def _remote_filesystem(snapshot: Snapshot) -> Any:
    """The file system of a remote snapshot's files, knowing their sizes already.

    DuckDB opens each file again for every view it binds; after one listing a table that costs no request. The option
    makes it another file system than all else uses, and trusts, but one for all snapshots: a client takes long to make.
    """
    folders = _folders(snapshot)
    fs, _ = fsspec.core.url_to_fs(next(iter(folders)), use_listings_cache=True)
    fs.invalidate_cache()
    for folder in folders:
        fs.ls(folder)
    return fs


def create_views(
    con: DuckDBPyConnection, snapshot: Snapshot, views: Collection[str] | None, create: str = "CREATE"
) -> None:
    """Make the views of `connect` in a database of its own, each by a statement that begins with `create`."""
    needed = set(_STANDS_ON if views is None else views)
    for name, reads in reversed(_STANDS_ON.items()):
        needed |= reads if name in needed else set()
    with _files_as_named():
        con.begin()  # one transaction for all takes a third less than each its own
        _create_tables(con, snapshot, create)
        made = _create_stack(con, needed, {f"ledger_{name}" for name in snapshot.tables}, create)
        con.commit()
        if views is None and {"answers", "active_recipe"} <= made:
            con.execute(f"{create} VIEW answers_wide AS {answers_wide(con)}")


def _create_tables(con: DuckDBPyConnection, snapshot: Snapshot, create: str) -> None:
    for name, table in snapshot.tables.items():
        con.execute(f"{create} VIEW ledger_{name} AS {_relation(name, table, TABLES[name])}")


def _create_stack(con: DuckDBPyConnection, needed: Collection[str], tables: Collection[str], create: str) -> set[str]:
    """Make the views that are needed, as far as what they stand on is there; returns the names of all that is."""
    made = set(tables)
    for view in _CREATE.finditer(VIEWS_SQL):
        is_macro = not _STANDS_ON[view[1]]
        if is_macro or (view[1] in needed and _STANDS_ON[view[1]] <= made):
            con.execute(f"{create}{view[0].removeprefix('CREATE')}")
            made.add(view[1])
    return made


@contextmanager
def _files_as_named() -> Iterator[None]:
    """Raise InputError where DuckDB cannot read a file that a snapshot names."""
    try:
        yield
    except duckdb.Error as error:
        if "Could not write" in str(error):  # index.duckdb itself, on a full disk
            raise
        raise InputError(
            f"a file that the store's log names is gone or damaged ({first_line(error)}); bring it back, or let "
            "`longvlm maintain --verify` say what it held, and `--repair` drop it, so that the next runs make it again."
        ) from error


def answers_wide(con: DuckDBPyConnection) -> str:
    """The SELECT of the view answers_wide, by the questions that a connection's answers were asked."""
    return sql_text.answers_wide(con.execute(sql_text.ASKED, [MAX_WIDE_COLUMNS]).fetchall())


def _relation(name: str, table: PinnedTable, schema: pa.Schema) -> str:
    """A SELECT over explicit files, or one without rows but with the right types.

    Files from before a column was added are read apart, so that DuckDB opens one of each kind and not every one of them
    to see what it has, as `union_by_name` would.
    """
    alike: dict[int, list[str]] = {}
    for file in table.files:
        alike.setdefault(min(num_columns(name, file.uri), len(schema)), []).append(file.uri)
    nulls = [f'CAST(NULL AS {_sql_type(field.type)}) AS "{field.name}"' for field in schema]
    selects = []
    for number, uris in sorted(alike.items(), reverse=True):
        columns = ", ".join([*(f'"{column}"' for column in schema.names[:number]), *nulls[number:]])
        selects.append(f"SELECT {columns} FROM {rows_of(uris)}")
    return " UNION ALL ".join(selects) or f"SELECT {', '.join(nulls)} WHERE false"


def _sql_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"{_sql_type(kind.value_type)}[]"
    if pa.types.is_struct(kind):
        return "STRUCT(" + ", ".join(f'"{field.name}" {_sql_type(field.type)}' for field in kind) + ")"
    return _SQL_TYPES[kind]


def rows_of(uris: Iterable[str]) -> str:
    """The SQL of the rows of parquet files, with the column `filename`, which `*` leaves out.

    What a folder is called says nothing of rows: without a word DuckDB would take `write_id=7/` for a column.
    """
    return f"read_parquet([{', '.join(map(quoted, uris))}], hive_partitioning = false)"
