"""The mendings that a store rests on, each of which can be taken out, so that the model proves that it can fail."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.transaction import CommitProperties

from longvlm.jobs.index import run
from longvlm.jobs.operate import maintain
from longvlm.pipeline.store import catalog, changes, delta, lease, ledger, logfiles, look
from longvlm.pipeline.store.changes import ChangeCriteria
from longvlm.pipeline.store.upkeep import compact, erase, family, repair
from longvlm.schemas import clock

Fault = Callable[[], AbstractContextManager[None]]


def _instead(*stand_ins: tuple[Any, str, Any]) -> Fault:
    """A fault that has other values under some names."""

    @contextmanager
    def fault() -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, stand_in in stand_ins:
                stack.enter_context(mock.patch.object(owner, name, stand_in))
            yield

    return fault


def _worded(owner: Any, name: str, old: str, new: str) -> tuple[Any, str, str]:
    """SQL with other words in one place. Raises RuntimeError where these are not there any more."""
    text: str = getattr(owner, name)
    if old not in text:
        raise RuntimeError(f"{owner.__name__}.{name} says {old!r} no more: the fault needs another patch")
    return owner, name, text.replace(old, new)


def _all(rows: pa.Table) -> pa.ChunkedArray:
    return pa.chunked_array([pa.repeat(True, rows.num_rows)])  # noqa: FBT003 - a value, not a flag


def _uncommitted_fences(commit: Callable[..., None]) -> Callable[..., None]:
    return lambda handle, actions: commit(handle, actions) if actions else None


def _by_the_clock(rows: pa.Table, _: Any, schema: pa.Schema) -> pa.Table:
    if "seq" in schema.names:
        rows = rows.drop_columns("seq") if "seq" in rows.column_names else rows
        rows = rows.append_column("seq", pa.repeat(pa.scalar(clock.now_us(), pa.int64()), rows.num_rows))
    return rows.select(schema.names).cast(schema)


class _Unchecked:
    """Parquet files that are read without a look at their checksums."""

    @staticmethod
    def ParquetFile(source: Any, **_: Any) -> pq.ParquetFile:  # noqa: N802 - stands in for the library's
        """A file."""
        return pq.ParquetFile(source)


def _claimed_age_s(folder: str, _: int) -> float:
    """The age of a lease by what its holder said and by our own clock."""
    _, claim = lease.newest(folder)
    return 0.0 if claim is None else claim.expiry_s - (claim.until_s - clock.now_s())


def _endless(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def claim(uri: str) -> Any:
        found = read(uri)
        return replace(found, expiry_s=1e12) if found is not None and not found.holder else found

    return claim


FAULTS: dict[str, Fault] = {
    # --- forgetting ---
    "cut-off-erasures-stay": _instead((maintain, "left_over", lambda *_: [])),
    "forgotten-rows-are-written": _instead((ledger.Store, "forgotten", lambda *_: frozenset())),
    "erasing-by-the-clock": _instead((erase, "_look_into_unnamed", lambda *_: ({}, {}))),
    "manifests-lift-tombstones": _instead(
        (run, "ChangeCriteria", lambda *args, **said: ChangeCriteria(*args, **said | {"is_manifest": False}))
    ),
    "forgotten-under-one-name": _instead(_worded(changes, "_MOVES", "IS NOT NULL OR alike = 1;", "IS NULL AND false;")),
    "copies-heal-checksums": _instead((compact, "pq", _Unchecked)),
    "erasing-by-name": _instead(
        _worded(family, "_NOT_LIVE", "ANTI JOIN (SELECT write_id FROM live_videos) USING (write_id)", "")
    ),
    "torn-videos-stay": _instead((erase, "delete_torn", lambda *_: 0)),
    # --- looks that grew stale ---
    "gone-files-are-named": _instead(
        (ledger, "missing_files", lambda *_: set()), (ledger, "taken", lambda *_: frozenset())
    ),
    "contents-are-forgotten-once": _instead((ledger, "alike", lambda *_: frozenset())),
    "torn-videos-go-live": _instead((ledger.Store, "_are_whole", lambda *given: _all(given[-1]))),
    "old-looks-are-written": _instead((look.Look, "holds", lambda _, rows, __: _all(rows))),
    "older-listings-go-live": _instead((look.Listed, "holds", lambda _, rows, __: _all(rows))),
    "listed-before-looking": _instead(
        _worded(changes, "_KNOWN", "HAVING max(seq) <= $listed_seq", "HAVING $listed_seq >= 0")
    ),
    "commits-upon-anything": _instead((delta, "_ALONE", CommitProperties())),
    "nothing-is-fenced": _instead((delta, "commit", _uncommitted_fences(delta.commit))),
    # --- rot ---
    "checkpoints-must-be-whole": _instead((logfiles, "drop_damaged_checkpoint", lambda _: False)),
    "repair-leaves-files": _instead((repair, "_drop", lambda *_: None)),
    # --- clocks ---
    "answers-by-the-clock": _instead(
        _worded(catalog, "VIEWS_SQL", "ORDER BY a.seq DESC NULLS LAST, a.created_at DESC", "ORDER BY a.created_at DESC")
    ),
    "seq-by-the-clock": _instead((ledger, "_numbered", _by_the_clock)),
    "leases-by-two-clocks": _instead((lease, "_age_s", _claimed_age_s)),
    "half-a-lease-holds-for-ever": _instead((lease, "_read", _endless(lease._read))),  # noqa: SLF001 - a patch is one
}
