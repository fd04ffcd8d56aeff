"""Search of a store, without Ray: which moments look like a text."""

from longvlm.jobs.cluster.activity import doing
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query.search import SearchResult, search
from longvlm.pipeline.vision.text_encoder import load_text_encoder
from longvlm.schemas.errors import InputError


def find_moments(store_uri: str, text: str, *, limit: int, where: str | None) -> SearchResult:
    """Search moments: those of a store whose search vectors are nearest to a text.

    Raises:
        InputError: the store is empty, or its tower has no text encoder.
    """
    doing(f"reading the store {store_uri}")
    store = Store.open(store_uri)
    active = store.active_recipe()
    if active is None:
        raise InputError(f"the store {store.uri} holds no videos yet; run `longvlm index` first.")
    doing("reading the text")
    query = load_text_encoder(active.recipe.tower.name).encode([text])[0]
    doing("comparing it with all moments")
    return search(store.pin(), query.numpy(), limit=limit, where=where)
