import pytest
import stores

from longvlm.pipeline.store.ledger import Store


@pytest.fixture
def store(tmp_path) -> Store:
    """A local store that knows two recipes; `stores.LONG` is the active one."""
    made = Store.create(str(tmp_path / "store"))
    made.register_recipe(stores.LONG, "some/model")
    made.register_recipe(stores.TINY, "some/model")
    return made
