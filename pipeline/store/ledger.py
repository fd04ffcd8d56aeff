"""The ledger: the Delta tables of a store, committed by one driver, pinned by any number of readers."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import RemoveAction

from longvlm.pipeline.store import catalog, delta
from longvlm.pipeline.store.files import canonical, check_writable, remove_files, write_parquet
from longvlm.pipeline.store.look import Listed, Look, Tombstones, alike
from longvlm.pipeline.store.snapshot import DataFile, PinnedTable, Snapshot
from longvlm.pipeline.store.taken import note, strike, taken
from longvlm.pipeline.store.uncommitted import SHARDED, Uncommitted, missing_files
from longvlm.pipeline.uris import is_local
from longvlm.schemas import clock
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

C = TypeVar("C", bound=Collection[str])
Check = Callable[[DeltaTable, pa.Table], pa.ChunkedArray]


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


class Store(delta.Logs):
    """The tables under one address. Make one with `create` or `open`.

    A handle belongs to one driver process and thread. Credentials and endpoints come from the environment alone, by the
    names that fsspec and deltalake share (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._uncommitted = Uncommitted()
        self._tombstones = Tombstones()

    @classmethod
    def create(cls, uri: str) -> "Store":
        """Make the tables that are missing, if any, and open the store; two processes may do so at once.

        Raises InputError where nothing can be written, and leaves nothing behind there, and where a newer version wrote
        the store.
        """
        store = cls(canonical(uri))
        if is_local(store.uri):
            check_writable(Path(store.uri))
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
        pinned |= {name: self.pinned(name) for name in filter(self.has, names)}
        return Snapshot(pinned)

    def recipes(self) -> list[RegisteredRecipe]:
        """Every recipe registered, in the order they became known."""
        rows = catalog.recipe_rows(self.pin(("recipes",)).table("recipes").files)
        return [RegisteredRecipe(row[0], row[1], json.loads(row[2]), *row[3:]) for row in rows]

    def active_recipe(self) -> RegisteredRecipe | None:
        """The recipe that the views show; None as long as none is registered."""
        return next((recipe for recipe in self.recipes() if recipe.active), None)

    # --- writing ---

    def commit(
        self, outcomes: pa.Table, videos: pa.Table, look: Look | Listed | None = None, since: int | None = None
    ) -> frozenset[str]:
        """Make shards, then videos, part of the store: tokens, segments, and last the rows that make them seen.

        All is looked at again upon the newest logs. A shard that is gone or being taken (`taking`), or that has rows of
        a video which was forgotten meanwhile, is not named; a write becomes live with all its segments or not at all.

        Args:
            outcomes: `tables.OUTCOMES`; the shards they name are added, each once however many units name it.
            videos: `tables.VIDEOS` rows; their `seq`, if there, is replaced by the moment of this commit, raised above
                all that is in the ledger.
            look: what the rows rest on: what was seen in the ledger before, or in the source that was listed.
            since: the newest seq of the ledger that the videos were planned by, see `forgotten`.

        Either may be empty. A conflict with another writer is retried with the same files; raises CommitFailedError
        when that does not help, OSError when the store is out of reach.

        Returns:
            The write ids of the rows that were left out. Their videos are to be watched again, unless they were
            forgotten, or another run came to know them as they are now (`look.Listed`).
        """
        self._uncommitted.add(outcomes)
        for table in SHARDED:
            self._name_shards(table, videos, since)
        left_out = self._append("videos", videos, partial(self._are_whole, look), since)
        self._uncommitted.settle(videos["write_id"].to_pylist())
        return frozenset(left_out["write_id"].to_pylist())

    def append(self, table: str, rows: pa.Table, look: Look | None = None) -> pa.Table:
        """Add rows to a small table; where it has a `seq`, that is set to this moment, raised above all it holds.

        Args:
            table: its name.
            rows: of its schema.
            look: for rows of `videos` that rest on what was seen in the ledger before.

        Returns:
            The rows that were left out: of videos that were forgotten, or of which a look does not hold any more.
        """
        return self._append(table, rows, partial(self._hold, look) if look else None)

    @contextlib.contextmanager
    def taking(self, table: str, find: Callable[[DeltaTable], C]) -> Iterator[C]:
        """While the body takes some things out of a table, no commit to it can name them any more.

        Args:
            table: its name.
            find: what is to be taken at a handle's version: names of files that the log does not name, or of `videos`
                write ids that are not live. It is asked again where another writer comes in between.

        Yields what was found.
        """
        noted: list[str] = []

        def say(handle: DeltaTable) -> C:
            names = find(handle)
            noted.append(note(self.uri, table, names))
            delta.commit(handle, [])
            return names

        yield self.upon_newest(table, say)
        for uri in noted:  # but not if the body failed: they do no harm
            strike(uri)

    def forgotten(self, rows: pa.Table | None = None, since: int | None = None) -> frozenset[str]:
        """The ids of the videos that are forgotten now, and of others whose content was forgotten meanwhile.

        Args:
            rows: these others, of tables.VIDEOS, to be committed.
            since: the newest seq of the ledger that they were planned by.
        """
        while True:
            pinned = self.pin(("videos",)).table("videos")
            try:
                tombstones = self._tombstones.read(pinned.files)
                return frozenset(tombstones) | (frozenset() if rows is None else alike(rows, tombstones, since))
            except FileNotFoundError:  # rewritten and deleted meanwhile, unless the log names it still
                if self.pin(("videos",)).table("videos").version == pinned.version:
                    raise

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

    def replace_files(self, table: str, old: Sequence[DataFile], new: Sequence[dict[str, Any]]) -> None:
        """Put files (`tables.SHARD`) in the place of others, whatever was added meanwhile.

        Both sides are marked as a change of data; otherwise two writers that replace the same files both succeed and
        double the rows.

        Raises:
            CommitFailedError: another writer replaced some of the files, or took the new ones (`taking`); start over.
        """
        folder = f"{self.uri}/{table}"
        gone = {file.uri.rpartition("/")[2]: file.size_bytes for file in old}
        come = [shard["path"] for shard in new]

        def attempt(handle: DeltaTable) -> bool:
            if not gone.keys() <= delta.names(handle):
                return False
            if missing_files(folder, come) or not taken(self.uri, table).isdisjoint(come):
                return False
            now_ms = clock.now_ms()
            removed = [
                RemoveAction(path, data_change=True, deletion_timestamp=now_ms, size=n) for path, n in gone.items()
            ]
            delta.commit(handle, [*removed, *map(delta.add_action, new)])
            return True

        if not self.upon_newest(table, attempt):
            raise CommitFailedError(f"files of {folder} were replaced or taken by another writer")

    # --- how commits are made ---

    def _name_shards(self, table: str, videos: pa.Table, since: int | None) -> None:
        """Commit the shards that wait, without those that may not be named any more."""
        waiting = self._uncommitted.waiting(table)

        def attempt(handle: DeltaTable) -> set[str]:
            forgotten, being_taken = self.forgotten(videos, since), taken(self.uri, table)
            refused = {path for path, shard in waiting.items() if path in being_taken or shard.video_ids & forgotten}
            refused |= missing_files(f"{self.uri}/{table}", waiting.keys() - refused)
            if named := [delta.add_action(shard.said) for path, shard in waiting.items() if path not in refused]:
                delta.commit(handle, named)
            return refused

        if waiting:
            refused = self.upon_newest(table, attempt)
            self._uncommitted.named(table, waiting.keys() - refused)
            self._uncommitted.lose(table, refused)
            remove_files(f"{self.uri}/{table}", refused)

    def _are_whole(self, look: Look | Listed | None, handle: DeltaTable, rows: pa.Table) -> pa.ChunkedArray:
        """Which rows of videos hold, and do not make a write live that is being taken or lacks some of its segments."""
        torn = taken(self.uri, "videos") | self._uncommitted.torn(
            rows.filter(pc.equal(rows["status"], "indexed")),
            lambda table: delta.names(self.handle(table)),
            lambda table: self.pin((table,)).table(table),
        )
        are_whole = pc.invert(pc.is_in(rows["write_id"], pa.array(torn, pa.string())))
        return are_whole if look is None else pc.and_(are_whole, self._hold(look, handle, rows))

    def _hold(self, look: Look | Listed, handle: DeltaTable, rows: pa.Table) -> pa.ChunkedArray:
        files = delta.data_files(f"{self.uri}/videos", handle)
        return look.holds(rows, files)

    def _append(self, table: str, rows: pa.Table, check: Check | None, since: int | None = None) -> pa.Table:
        """Add rows upon the newest version of a table, those that pass a check against it; returns the others."""
        if not rows.num_rows:
            return rows
        schema, folder = TABLES[table], f"{self.uri}/{table}"
        if not self.has(table):
            delta.create_table(folder, schema)
        drafts: list[tuple[str, pa.Table]] = []  # of attempts: the file, and the rows left out of it

        def attempt(handle: DeltaTable) -> pa.Table:
            if drafts and drafts[-1][0] in delta.names(handle):  # only the answer to that commit was lost
                return drafts[-1][1]
            remove_files(folder, [path for path, _ in drafts])
            passed = self._are_known(table, rows, since)
            if check:
                passed = pc.and_(passed, check(handle, rows))
            kept, left_out = rows.filter(passed), rows.filter(pc.invert(passed))
            if kept.num_rows:
                shard = write_parquet(self.uri, table, _numbered(kept, handle, schema))
                drafts.append((shard["path"], left_out))
                delta.commit(handle, [delta.add_action(shard)])
            return left_out

        return self.upon_newest(table, attempt)

    def _are_known(self, table: str, rows: pa.Table, since: int | None) -> pa.ChunkedArray:
        """Which rows are not of forgotten videos; deletions may be."""
        if "video_id" not in rows.column_names:
            return pa.chunked_array([pa.repeat(True, rows.num_rows)])  # noqa: FBT003 - a value, not a flag
        forgotten = self.forgotten(rows if table == "videos" else None, since)
        known = pc.invert(pc.is_in(rows["video_id"], pa.array(forgotten, pa.string())))
        return pc.or_(known, pc.equal(rows["status"], "deleted")) if table == "videos" else known


def _numbered(rows: pa.Table, handle: DeltaTable, schema: pa.Schema) -> pa.Table:
    """Rows of a table with their `seq`, if it has one: this moment, raised above all that the table holds."""
    if "seq" in schema.names:
        actions = delta.added(handle)
        largest = pc.max(actions["max.seq"]).as_py() if "max.seq" in actions.column_names else None
        seq = max(clock.now_us(), (largest or 0) + 1)
        rows = rows.drop_columns("seq") if "seq" in rows.column_names else rows
        rows = rows.append_column("seq", pa.repeat(pa.scalar(seq, pa.int64()), rows.num_rows))
    return rows.select(schema.names).cast(schema)
