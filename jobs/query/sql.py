"""SQL over a store, sealed: a query reads the store and what is attached to it, and nothing else."""

from collections.abc import Iterable

import pyarrow as pa

from longvlm.jobs.cluster.activity import doing
from longvlm.jobs.names import match_questions
from longvlm.pipeline.store import access, catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.snapshot import Snapshot
from longvlm.schemas.errors import InputError


def run_sql(store_uri: str, query: str, attach: Iterable[str] = ()) -> pa.Table:
    """The result of one SELECT over the views of a store as it is now.

    Args:
        store_uri: a local or remote store.
        query: one SELECT statement.
        attach: files that it may read too, each as NAME=FILE; see `access.attach`.

    Raises:
        InputError: there is no such store, a file cannot be attached, or the query cannot run.
    """
    doing(f"reading the store {store_uri}")
    snapshot = Store.open(store_uri).pin()
    with catalog.connect(snapshot) as con:
        access.seal(con, snapshot, access.attach(con, attach))
        doing("running the query")
        return catalog.query(con, query)


def find_live(snapshot: Snapshot, video: str) -> tuple[str, str]:
    """The uri and write_id of the live video that a name means: its uri, external_id, path, file name or stem.

    Of a video that is live under several recipes it is the write that the views show.

    Raises:
        InputError: no live video answers to the name, or several do.
    """
    with catalog.connect(Snapshot({"videos": snapshot.table("videos"), "recipes": snapshot.table("recipes")})) as con:
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
