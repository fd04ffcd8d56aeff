"""What a store remembers of how it is to be filled and no recipe decides: events among its recipes; the last counts."""

import pyarrow as pa

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas.tables import RECIPES

_THUMBNAILS = {"thumbnails": True, "no_thumbnails": False}  # by event
_LAST = "SELECT event FROM ledger_recipes WHERE list_contains(?, event) ORDER BY seq DESC LIMIT 1"


def keeps_thumbnails(store: Store | None) -> bool:
    """Whether segments that are indexed get a thumbnail: as a store was told last; one that was told nothing does."""
    if store is None:
        return True
    with catalog.connect(store.pin(("recipes",)), ()) as con:
        last = con.execute(_LAST, [[*_THUMBNAILS]]).fetchone()
    return _THUMBNAILS[last[0]] if last else True


def remember_thumbnails(store: Store, *, keeps: bool) -> None:
    """Let a store remember whether segments get a thumbnail from now on."""
    if keeps != keeps_thumbnails(store):
        event = next(name for name, value in _THUMBNAILS.items() if value == keeps)
        store.append("recipes", pa.Table.from_pylist([{"event": event}], RECIPES))
