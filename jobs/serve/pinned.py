"""The store as pages show it: its views over one pinned snapshot, in a database that is renewed as its log moves."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import duckdb

from longvlm.jobs.cluster.resources import SERVE
from longvlm.jobs.query.sql import without_damaged
from longvlm.pipeline.source.scratch import ScratchFolder
from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError, QueryError
from longvlm.schemas.recipe import from_spec
from longvlm.schemas.sql_text import quoted

# Every page stands on these two, which look through the whole ledger; of a pinned snapshot they never change.
_MADE_ONCE = ("live_videos", "failed_videos")
Row = dict[str, Any]


class BusyError(Exception):
    """Too much is asked for at once; the same request may be made again in a moment."""


class PinnedStore:
    """A sealed database over one snapshot: it reads that and nothing else, writes nothing, and threads may share it.

    Args:
        store_uri: of the store.
        snapshot: from `Store.pin`.

    Raises:
        InputError: a file that the snapshot names is gone.
    """

    def __init__(self, store_uri: str, snapshot: Snapshot) -> None:
        self.store_uri, self.snapshot = store_uri, snapshot
        self.is_broken = False
        whole = without_damaged(snapshot)
        self._con = catalog.connect(whole, apart=True)
        self._con.execute("SET GLOBAL TimeZone = 'UTC'")  # of cursors, too
        self._con.execute(f"SET memory_limit = '{SERVE.duckdb_memory}'")
        self._con.execute(f"SET threads = {SERVE.duckdb_threads}")
        self._scratch = ScratchFolder()  # removed with this
        self._copies = {view: f"{self._scratch.name}/{view}.parquet" for view in _MADE_ONCE}
        self._copying, self._has_copies = threading.Lock(), False
        # from here on; what does not fit into memory goes to a folder of its own
        access.seal(self._con, whole, self._copies.values())
        for view in _MADE_ONCE:
            self._con.execute(f"CREATE TABLE made_{view} AS FROM {view} ORDER BY uri, video_id")
            self._con.execute(f"CREATE OR REPLACE VIEW {view} AS FROM made_{view}")

    @contextmanager
    def cursor(self, limit_s: float = SERVE.page_s) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for one query, which is interrupted after so many seconds.

        Raises:
            QueryError: the query cannot run, or took too long.
        """
        cursor = self._con.cursor()
        timer = threading.Timer(limit_s, cursor.interrupt)
        timer.daemon = True
        timer.start()
        try:
            yield cursor
        except duckdb.InterruptException as error:
            raise QueryError(f"the query was ended after {limit_s:.0f} s; ask for less.") from error
        except duckdb.FatalException as error:
            self.is_broken = True  # it takes no more queries
            raise QueryError(f"the query cannot run: {catalog.without_place(error)}") from error
        except duckdb.Error as error:
            raise QueryError(f"the query cannot run: {catalog.without_place(error)}") from error
        finally:
            timer.cancel()
            cursor.close()

    def rows(self, sql: str, values: Row | None = None, limit: int | None = None) -> list[Row]:
        """Rows of a query of the server's own.

        Args:
            sql: one SELECT, with `$name` for values.
            values: by name.
            limit: how many are fetched at most, whatever the query says.

        Raises:
            QueryError: as `cursor`.
        """
        with self.cursor() as cursor:
            cursor.execute(sql, values or {})
            names = [column[0] for column in cursor.description or ()]
            found = cursor.fetchall() if limit is None else cursor.fetchmany(limit)
        return [dict(zip(names, row, strict=True)) for row in found]

    def copies(self) -> dict[str, str]:
        """What all views stand on, as parquet files by the names of the views; the first call writes them.

        They are there for as long as this is.
        """
        with self._copying, self.cursor() as cursor:
            for view in [] if self._has_copies else _MADE_ONCE:
                cursor.execute(f"COPY made_{view} TO {quoted(self._copies[view])} (FORMAT parquet)")
            self._has_copies = True
        return self._copies

    @cached_property
    def tower(self) -> str:
        """The tower of the recipe that the views show. Raises InputError where there is none yet."""
        found = self.rows("SELECT spec FROM recipes WHERE active")
        if not found:
            raise InputError("the store holds no videos yet; run `longvlm index` first.")
        return from_spec(json.loads(found[0]["spec"])).tower.name

    @cached_property
    def recipe(self) -> str:
        """The fingerprint of the recipe that the views show; empty where there is none yet."""
        found = self.rows("SELECT recipe FROM recipes WHERE active")
        return str(found[0]["recipe"]) if found else ""

    @cached_property
    def num_by_status(self) -> dict[str, int]:
        """How many videos there are, by status."""
        counted = self.rows("SELECT status, count(*) AS number FROM videos GROUP BY status ORDER BY status DESC")
        return {row["status"]: row["number"] for row in counted}

    @cached_property
    def failure_reasons(self) -> Sequence[Row]:
        """What videos failed of, the most frequent first: error_code, number, error (of one of them)."""
        return self.rows(
            "SELECT error_code, count(*) AS number, min(error) AS error FROM failures "
            "GROUP BY error_code ORDER BY number DESC, error_code"
        )

    @cached_property
    def questions(self) -> Sequence[Row]:
        """What was asked, newest first, at most 500: question_hash, question, type, num_videos."""
        return self.rows(
            "SELECT question_hash, min(question) AS question, min(type) AS type, "
            "count(DISTINCT write_id) AS num_videos, max(created_at) AS asked_at FROM answers GROUP BY question_hash "
            "ORDER BY asked_at DESC, question_hash LIMIT 500"
        )


class ShownStore:
    """A store that is looked at for as long as the server runs.

    Args:
        store_uri: of a store that exists.

    Raises:
        InputError: there is no store, or it cannot be read.
    """

    def __init__(self, store_uri: str) -> None:
        store = Store.open(store_uri)
        self.store_uri = store.uri
        self._renewing = threading.Lock()
        self._looked_s = time.monotonic()
        self._pinned = PinnedStore(store.uri, store.pin())
        self.trouble: str | None = None  # why the store could not be looked at again

    def pinned(self) -> PinnedStore:
        """The store as it is now, or was a few seconds ago: what of a large one is computed anew is not waited for."""
        is_broken = self._pinned.is_broken
        is_due = is_broken or time.monotonic() - self._looked_s > SERVE.renew_s
        if is_due and self._renewing.acquire(blocking=is_broken):
            # the process waits for it at its end: DuckDB cannot be left in the middle
            looking = threading.Thread(target=self._renew_and_release, name="renew")
            looking.start()
            looking.join(None if is_broken else SERVE.renew_wait_s)
        return self._pinned

    def _renew_and_release(self) -> None:
        try:
            self._renew()
        except Exception:  # nobody waits for it any more: pages say so, and the log says what it was
            self.trouble = "something went wrong; the log says what."
            raise
        finally:
            self._renewing.release()

    def renewed(self) -> PinnedStore:
        """The store as it is now, whenever it was looked at last: with what this process has just written."""
        with self._renewing:
            self._renew()
        return self._pinned

    def _renew(self) -> None:
        self._looked_s = time.monotonic()
        try:
            snapshot = Store.open(self.store_uri).pin()
            if self._pinned.is_broken or snapshot != self._pinned.snapshot:
                self._pinned = PinnedStore(self.store_uri, snapshot)  # queries that run keep the one of before
        except (InputError, OSError) as error:  # out of reach, perhaps for a moment: pages say so
            self.trouble = str(error)
        else:
            self.trouble = None


@contextmanager
def waiting(turns: threading.Semaphore) -> Iterator[None]:
    """A turn of a few. Raises BusyError where none comes soon."""
    if not turns.acquire(timeout=SERVE.wait_s):
        raise BusyError
    try:
        yield
    finally:
        turns.release()
