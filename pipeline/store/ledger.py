"""The ledger: the Delta tables of a store, committed by one driver, pinned by any number of readers."""

import contextlib
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from longvlm.pipeline.store import catalog, delta
from longvlm.pipeline.store.files import canonical, write_parquet
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.uris import is_local
from longvlm.schemas.errors import InputError
from longvlm.schemas.recipe import IndexRecipe, from_spec
from longvlm.schemas.tables import TABLES

_CREATED = (
    "tokens",
    "segments",
    "answers",
    "verdicts",
    "recipes",
    "runs",
    "videos",
)  # videos last: it makes the store exist
_PINNED = ("videos", "segments", "tokens", "answers", "verdicts", "recipes", "runs")  # videos first: its names hold
_ADDED_LATER = ("verdicts",)  # tables that stores of earlier versions lack until something is written to them
_COMMIT_TRIES = 8


@dataclass(frozen=True)
class RegisteredRecipe:
    """A recipe as a store knows it, under its newest name and model."""

    fingerprint: str
    name: str
    spec: dict[str, Any]
    model: str  # what `--model` named: the default of `answer` and `search`
    active: bool  # whether the views show it
    registered_seq: int

    @property
    def recipe(self) -> IndexRecipe:
        """The recipe itself."""
        return from_spec(self.spec)


class Store:
    """The tables under one address. Make one with `create` or `open`.

    A handle belongs to one driver process and thread. Credentials and endpoints come from the environment alone, by the
    names that fsspec and deltalake share (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._tables: dict[str, DeltaTable] = {}
        self._named: set[str] = set()  # shards this handle has committed

    @classmethod
    def create(cls, uri: str) -> "Store":
        """Make the tables that are missing, if any, and open the store; two processes may do so at once.

        Raises InputError where nothing can be written, and leaves nothing behind there, and where a newer version wrote
        the store.
        """
        store = cls(canonical(uri))
        if is_local(store.uri):
            _check_writable(Path(store.uri))
        try:
            with contextlib.suppress(TableNotFoundError):
                store._table("videos")  # of a newer version: refused before anything is written
            for table in _CREATED:
                delta.create_table(f"{store.uri}/{table}", TABLES[table])
        except (OSError, DeltaError) as error:
            raise InputError(
                f"the store {store.uri} cannot be written: {delta.reason(error)}; check its address and your rights."
            ) from error
        return store

    @classmethod
    def open(cls, uri: str) -> "Store":
        """Open a store that exists. Raises InputError if there is none, or as `find`."""
        store = cls.find(uri)
        if store is None:
            where = canonical(uri)
            raise InputError(f"there is no store at {where}; make one with `longvlm index SOURCE --store {where}`.")
        return store

    @classmethod
    def find(cls, uri: str) -> "Store | None":
        """Open a store if there is one. Raises InputError if it may not be read, or a newer version wrote it."""
        store = cls(canonical(uri))
        try:
            store._table("videos")
        except TableNotFoundError:
            return None
        except (OSError, DeltaError) as error:
            raise InputError(
                f"the store {store.uri} cannot be read: {delta.reason(error)}; check its address and your rights."
            ) from error
        return store

    # --- reading ---

    def pin(self, names: Sequence[str] = _PINNED) -> Snapshot:
        """The files of every table (or of those named) now: videos first, so that whatever it names is there."""
        pinned = dict.fromkeys(names, PinnedTable())  # one that is not there yet is empty
        for name in filter(self.has, names):
            handle = self.handle(name)
            pinned[name] = PinnedTable(handle.version(), delta.data_files(f"{self.uri}/{name}", handle))
        return Snapshot(pinned)

    def has(self, table: str) -> bool:
        """Whether a table is there: one that an earlier version did not know may be missing, and is then empty."""
        if table in _ADDED_LATER:
            try:
                self._table(table)
            except TableNotFoundError:
                return False
        return True

    def recipes(self) -> list[RegisteredRecipe]:
        """Every recipe registered, in the order they became known."""
        sql = "SELECT recipe, name, spec, model, active, registered_seq FROM recipes ORDER BY registered_seq, recipe"
        with catalog.connect(self.pin(("recipes",))) as con:
            rows = con.execute(sql).fetchall()
        return [RegisteredRecipe(row[0], row[1], json.loads(row[2]), *row[3:]) for row in rows]

    def active_recipe(self) -> RegisteredRecipe | None:
        """The recipe that the views show; None as long as none is registered."""
        return next((recipe for recipe in self.recipes() if recipe.active), None)

    # --- writing ---

    def commit(self, outcomes: pa.Table, videos: pa.Table) -> None:
        """Make shards, then videos, part of the store: tokens, segments, and last the rows that make them seen.

        Args:
            outcomes: `tables.OUTCOMES`; the shards they name are added, each once however many units name it.
            videos: `tables.VIDEOS` rows; their `seq`, if there, is replaced by the moment of this commit, raised above
                all that is in the ledger.

        Either may be empty. A conflict with another writer is retried with the same files; raises CommitFailedError
        when that does not help, OSError when the store is out of reach.
        """
        for table in ("tokens", "segments"):
            shards = {shard["path"]: shard for shard in outcomes[f"{table}_shard"].to_pylist() if shard}
            new = [shard for path, shard in shards.items() if path not in self._named]
            if new:
                self._add(table, new)
            self._named.update(shards)
        if videos.num_rows:
            self.append("videos", videos)

    def append(self, table: str, rows: pa.Table) -> None:
        """Add rows to a small table; where it has a `seq`, that is set to this moment, raised above all it holds."""
        if not rows.num_rows:
            return
        schema = TABLES[table]
        if not self.has(table):
            delta.create_table(f"{self.uri}/{table}", schema)
        if "seq" in schema.names:
            seq = pa.repeat(pa.scalar(self._next_seq(table), pa.int64()), rows.num_rows)
            rows = (rows.drop_columns("seq") if "seq" in rows.column_names else rows).append_column("seq", seq)
        self._add(table, [write_parquet(self.uri, table, rows.select(schema.names).cast(schema))])

    def register_recipe(self, recipe: IndexRecipe, model: str) -> None:
        """Let the store know a recipe and the model it came with; the first one becomes the active one.

        A fingerprint that is known is written again only under a new name or model, which then count.
        """
        known = {entry.fingerprint: entry for entry in self.recipes()}
        same = known.get(recipe.fingerprint)
        rows = []
        if same is None or (same.name, same.model) != (recipe.name, model):
            row = {"recipe": recipe.fingerprint, "name": recipe.name, "spec": json.dumps(recipe.spec()), "model": model}
            rows.append({**row, "event": "registered"})
        if not any(entry.active for entry in known.values()):
            rows.append({"recipe": recipe.fingerprint, "event": "promoted"})
        self.append("recipes", pa.Table.from_pylist(rows, TABLES["recipes"]))

    def promote(self, name_or_fingerprint: str) -> RegisteredRecipe:
        """Let the views show another recipe. Raises InputError, naming the known ones, if it is not clear which."""
        known = self.recipes()
        found = [entry for entry in known if name_or_fingerprint in (entry.name, entry.fingerprint)]
        if len(found) != 1:
            listed = ", ".join(f"{entry.name} ({entry.fingerprint})" for entry in known) or "none yet"
            problem = "is the name of several recipes" if found else "is no recipe of this store"
            raise InputError(f"{name_or_fingerprint} {problem}; name one by its fingerprint: {listed}.")
        if not found[0].active:
            event = {"recipe": found[0].fingerprint, "event": "promoted"}
            self.append("recipes", pa.Table.from_pylist([event], TABLES["recipes"]))
        return next(entry for entry in self.recipes() if entry.fingerprint == found[0].fingerprint)

    def replace_files(self, table: str, version: int, old: Sequence[DataFile], new: Sequence[dict[str, Any]]) -> None:
        """Put files (`tables.SHARD`) in the place of others, upon the version these were pinned at.

        Both sides are marked as a change of data; otherwise two writers that replace the same files both succeed and
        double the rows. Raises CommitFailedError when another writer changed the table first; start over from `pin`.
        """
        handle = delta.open_table(f"{self.uri}/{table}", version)
        now_ms = time.time_ns() // 1_000_000
        removed = [
            RemoveAction(file.uri.rpartition("/")[2], data_change=True, deletion_timestamp=now_ms, size=file.size_bytes)
            for file in old
        ]
        actions: list[AddAction | RemoveAction] = [*removed, *map(delta.add_action, new)]
        with delta.refusing_newer(f"{self.uri}/{table}"):
            handle.create_write_transaction(actions, mode="append", schema=handle.schema())

    # --- the Delta tables themselves ---

    def handle(self, table: str) -> DeltaTable:
        """Delta's own handle of a table, at its newest version."""
        is_known = table in self._tables
        handle = self._table(table)
        if is_known:  # one that was opened just now is at the newest
            delta.refresh(f"{self.uri}/{table}", handle)
        return handle

    def columns(self, table: str) -> pa.Schema:
        """The columns that a table has now; a newer version may have added some that `tables.TABLES` does not know."""
        return delta.columns(self.handle(table), TABLES[table])

    def _table(self, table: str) -> DeltaTable:
        if table not in self._tables:
            self._tables[table] = delta.open_table(f"{self.uri}/{table}")
        return self._tables[table]

    def _add(self, table: str, shards: list[dict[str, Any]]) -> None:
        """Commit files, and before them the columns that the table lacks.

        On a conflict reload and try again with the same files, a bounded number of times.
        """
        actions: list[AddAction | RemoveAction] = [delta.add_action(shard) for shard in shards]
        for attempt in range(_COMMIT_TRIES):
            handle = self.handle(table)
            try:
                with delta.refusing_newer(f"{self.uri}/{table}"):
                    delta.add_columns(handle, TABLES[table])
                    handle.create_write_transaction(actions, mode="append", schema=handle.schema())
            except CommitFailedError:
                if attempt + 1 == _COMMIT_TRIES:
                    raise
                time.sleep(random.uniform(0.5, 1) * 0.05 * 2**attempt)  # noqa: S311 - spreads writers, guards nothing
            else:
                return

    def _next_seq(self, table: str) -> int:
        handle = self.handle(table)
        actions = pa.table(handle.get_add_actions(flatten=True))
        largest = pc.max(actions["max.seq"]).as_py() if "max.seq" in actions.column_names else None
        return max(time.time_ns() // 1000, (largest or 0) + 1)


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - never raises
    if not existing.is_dir():
        raise InputError(f"the store {folder} cannot be made: {existing} is a file; choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"the store {folder} cannot be written: {existing} is read-only here; choose another folder.")
