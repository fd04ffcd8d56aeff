"""A store's tables on Delta's own side: made, opened in a format that is known here, given new columns.

Columns are only ever added, at the end of a table's schema, nullable, and none is renamed or removed. So every file
has the first so many columns of its table, rows from before a column was there read as null, and a version that does
not know a column leaves it alone. That is no change of the format.

A format is what a version must know to read a table rightly. `FORMAT_KEY` in the configuration of Delta's metadata says
which one a table has; where it is absent that is format 1, the only one so far. A version that changes what rows mean,
or how files are laid out, goes on reading the formats before it, and writes the next number with
`alter.set_table_properties` before the first such row: to `videos`, which all open first, then to the other tables.
Every version after 0.1.0 refuses a number that it does not know, whether it opens a table or holds it open; a commit
that is under way fails, because Delta sees that the metadata changed.

Version 0.1.0 looks at no number, and drops columns that it does not know when it merges files. Its jobs must have ended
before a store gets a column or another format, and whoever adds the first of either says so in the change log.
"""

import atexit
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction

from longvlm.pipeline.store import logfiles
from longvlm.pipeline.store.files import UNSPEAKABLE
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable
from longvlm.pipeline.uris import is_local
from longvlm.schemas import clock
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import TABLES

FORMAT = 1  # the newest that is known here
FORMAT_KEY = "longvlm.format"
_ADDED_LATER = ("verdicts",)  # tables that stores of earlier versions lack until something is written to them
_COMMIT_TRIES = 40  # half a minute at least: whoever reads more before it commits is overtaken more often
_LONGEST_WAIT_S = 1.6  # whoever waits longer than others commit is only overtaken again
_LOOKS = 10  # at a log with a gap, which is believed after so many
_ALONE = CommitProperties(max_commit_retries=0)  # or of two at once both would commit the same change
_BY_NEWER = "was written by a newer longvlm; upgrade with `pip install --upgrade longvlm-index`."

T = TypeVar("T")


def address(uri: str) -> str:
    """A table's address as delta-rs takes it: it decodes what it is given, so a bare path may lead to another folder.

    A local path that it cannot take in any writing is reached through a temporary folder, whose `_delta_log` is a link
    to the table's. The log is all that delta-rs is asked to read and write; data files are named relative to the table.
    """
    if not is_local(uri):
        protocol, _, path = uri.partition("://")
        return f"{protocol}://{quote(path, safe='/@:')}"
    return Path(_stand_in(uri) if UNSPEAKABLE.search(uri) else uri).as_uri()


def storage_options(uri: str) -> dict[str, str]:
    """What delta-rs has to be told of a store beyond the environment: that an S3 service at http:// is meant."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if not uri.startswith(("s3://", "s3a://")) or not endpoint.lower().startswith("http://"):
        return {}
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": os.environ.get("AWS_ALLOW_HTTP") or "true"}


@cache  # a folder for each table and process
def _stand_in(path: str) -> Path:
    log = Path(path, "_delta_log")
    folder = Path(tempfile.mkdtemp(prefix="longvlm-table-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / log.name).symlink_to(log)
    return folder


def create_table(uri: str, schema: pa.Schema) -> None:
    """Make a table where there is none; two processes may do so at once."""
    if is_local(uri):
        Path(uri, "_delta_log").mkdir(parents=True, exist_ok=True)
    try:
        DeltaTable.create(
            address(uri),
            storage_options=storage_options(uri),
            schema=Schema.from_arrow(schema),
            mode="ignore",
            configuration={"delta.checkpointInterval": "25"},  # a commit reads the log since the last one again
            commit_properties=_ALONE,
        )
    except DeltaError:
        if not DeltaTable.is_deltatable(address(uri), storage_options(uri)):  # else another process made it just now
            raise


def open_table(uri: str) -> DeltaTable:
    """Delta's handle of a table, at its newest version.

    A newest checkpoint that is lost or damaged is done without, where the log is whole without it.

    Raises:
        InputError: a newer version wrote it, or the log is not whole.
        TableNotFoundError: there is none.
        DeltaError, OSError: it cannot be read.
    """
    with refusing_newer(uri):
        try:
            handle = _past_gaps(_opened, uri)
        except TableNotFoundError:
            raise
        except DeltaError:
            is_dropped = logfiles.drop_damaged_checkpoint(f"{uri}/_delta_log")
            logfiles.refuse_damaged(f"{uri}/_delta_log")
            if not is_dropped:
                raise
            handle = _past_gaps(_opened, uri)
    _check_format(uri, handle)
    return handle


def refresh(uri: str, handle: DeltaTable) -> None:
    """Bring a handle to the newest version of its table. Raises as `open_table`."""
    with refusing_newer(uri):
        try:
            _past_gaps(handle.update_incremental)
        except DeltaError:
            logfiles.refuse_damaged(f"{uri}/_delta_log")
            raise
    _check_format(uri, handle)


def _opened(uri: str) -> DeltaTable:
    return DeltaTable(address(uri), storage_options=storage_options(uri))


def _past_gaps(look: Callable[..., T], *arguments: str) -> T:
    """A look at a log, made again where it shows a gap: what is written during the listing of a folder is seen or not.

    So a look may show a commit without the one before it. The next look shows both, and at worst another gap behind.
    """
    number = 0
    while True:
        number += 1
        try:
            return look(*arguments)
        except DeltaError as error:
            if not _shows_gap(error) or number == _LOOKS:
                raise
            time.sleep(0.02)


def _shows_gap(error: Exception) -> bool:
    return "found gap" in str(error)  # the library has no class of its own for this


@contextmanager
def refusing_newer(uri: str) -> Iterator[None]:
    """Tell in a sentence (InputError) that a table needs a feature of Delta's that this version's library lacks."""
    try:
        yield
    except DeltaError as error:
        if re.search(r"Unsupported(: | table features)", str(error)):  # the library has no class of its own for this
            raise InputError(f"the table {uri} cannot be used ({reason(error)}): it {_BY_NEWER}") from error
        raise


def add_columns(handle: DeltaTable, schema: pa.Schema) -> None:
    """Add the columns of a schema that a table lacks, if any, in one commit of metadata alone.

    Raises:
        CommitFailedError: another writer came first; refresh the handle and look again.
    """
    held = {field.name for field in handle.schema().fields}
    missing = [field for field in schema if field.name not in held]
    if missing:
        handle.alter.add_columns(Schema.from_arrow(pa.schema(missing)).fields, commit_properties=_ALONE)


def commit(handle: DeltaTable, actions: Sequence[AddAction | RemoveAction]) -> None:
    """Commit actions upon the handle's version; CommitFailedError where anything was committed since."""
    handle.create_write_transaction([*actions], mode="append", schema=handle.schema(), commit_properties=_ALONE)


def columns(handle: DeltaTable, known: pa.Schema) -> pa.Schema:
    """The columns that a table has, also those of a newer version, which `known` lacks."""
    stored = pa.schema(handle.schema().to_arrow())
    return pa.schema([known.field(field.name) if field.name in known.names else field for field in stored])


def added(handle: DeltaTable) -> pa.Table:
    """The log's actions that name a table's files at the handle's version, one row a file, statistics among them."""
    # pa.table would import pandas to see whether it is given a frame: a third of what it takes to look at a store
    return pa.RecordBatchReader.from_stream(handle.get_add_actions(flatten=True)).read_all()


def names(handle: DeltaTable) -> frozenset[str]:
    """The names of a table's files at the handle's version."""
    return frozenset(added(handle)["path"].to_pylist())


def data_files(table_uri: str, handle: DeltaTable) -> tuple[DataFile, ...]:
    """The files of a table at the handle's version, with what the log says of them."""
    actions = added(handle)
    facts = ["path", "size_bytes", "num_records", "min.write_id", "max.write_id", "max.seq"]
    values = [
        actions[name].to_pylist() if name in actions.column_names else [None] * actions.num_rows for name in facts
    ]
    return tuple(DataFile(f"{table_uri}/{path}", *said) for path, *said in zip(*values, strict=True))


def stale_files(uri: str, handle: DeltaTable, hours: int, *, full: bool) -> list[str]:
    """Files of a table, relative to it, that its log dropped at least so many hours ago; `full`: or has never named."""
    if is_local(uri) and UNSPEAKABLE.search(uri):  # files are looked for where the handle is
        folder = _stand_in(uri)
        for link in folder.glob("*.parquet"):
            link.unlink()
        for file in Path(uri).glob("*.parquet"):
            (folder / file.name).symlink_to(file)
    return handle.vacuum(hours, dry_run=True, enforce_retention_duration=False, full=full)


def add_action(shard: dict[str, Any]) -> AddAction:
    """A closed file (`tables.SHARD`) as the log will name it."""
    return AddAction(
        path=shard["path"],
        size=shard["size_bytes"],
        partition_values={},
        modification_time=clock.now_ms(),
        data_change=True,
        stats=shard["stats"],
    )


def reason(error: Exception) -> str:
    """The telling line of an error that may come as a coloured tree with a server's XML in it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if message := re.search(r"<Message>(.*?)</Message>", text):
        return message[1].rstrip(".")
    root_cause = text.rpartition("\u21b3")[2]
    return root_cause.strip().partition("\n")[0].rstrip(".!")


def _check_format(uri: str, handle: DeltaTable) -> None:
    written = handle.metadata().configuration.get(FORMAT_KEY, "1")
    if not written.isdecimal() or int(written) > FORMAT:
        raise InputError(f"the table {uri} has format {written}, of which this version knows nothing: it {_BY_NEWER}")


class Logs:
    """The logs of the tables under one address, of one process and thread."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._tables: dict[str, DeltaTable] = {}
        self._pinned: dict[str, PinnedTable] = {}

    def has(self, table: str) -> bool:
        """Whether a table is there: one that an earlier version did not know may be missing, and is then empty."""
        if table in _ADDED_LATER:
            try:
                self._table(table)
            except TableNotFoundError:
                return False
        return True

    def handle(self, table: str) -> DeltaTable:
        """Delta's own handle of a table, at its newest version."""
        is_known = table in self._tables
        handle = self._table(table)
        if is_known:  # one that was opened just now is at the newest
            refresh(f"{self.uri}/{table}", handle)
        return handle

    def pinned(self, table: str) -> PinnedTable:
        """The files of a table now. A version has one list, which is read once, however often somebody asks."""
        handle = self.handle(table)
        known = self._pinned.get(table)
        if known is None or known.version != handle.version():
            known = PinnedTable(handle.version(), data_files(f"{self.uri}/{table}", handle))
            self._pinned[table] = known
        return known

    def columns(self, table: str) -> pa.Schema:
        """The columns that a table has now; a newer version may have added some that `tables.TABLES` does not know."""
        return columns(self.handle(table), TABLES[table])

    def upon_newest(self, table: str, attempt: Callable[[DeltaTable], T]) -> T:
        """What an attempt returns that commits upon the newest version of a table, which has all columns by then.

        Where another writer comes in between it is made again, a bounded number of times: what it looks at before it
        commits holds when it does. So it is where a file that it looked for is gone, as when others forget a video.

        Raises:
            CommitFailedError, FileNotFoundError: others kept coming in between.
        """
        number = 0
        while True:
            number += 1
            handle = self.handle(table)
            try:
                with refusing_newer(f"{self.uri}/{table}"):
                    add_columns(handle, TABLES[table])
                    return attempt(handle)
            except (DeltaError, FileNotFoundError) as error:
                is_overtaken = isinstance(error, (CommitFailedError, FileNotFoundError)) or _shows_gap(error)
                if number == _COMMIT_TRIES or not is_overtaken:
                    raise
                longest = min(0.05 * 2**number, _LONGEST_WAIT_S)
                time.sleep(random.uniform(0.5, 1) * longest)  # noqa: S311 - spreads writers, guards nothing

    def _table(self, table: str) -> DeltaTable:
        if table not in self._tables:
            self._tables[table] = open_table(f"{self.uri}/{table}")
        return self._tables[table]
