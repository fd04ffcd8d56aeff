import shutil

import pytest
import stores

from longvlm.pipeline.store.ledger import Store


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> str:
    """Where a local store lies that knows two recipes and nothing else; tests take a copy."""
    made = Store.create(str(tmp_path_factory.mktemp("empty") / "store"))
    made.register_recipe(stores.LONG, "some/model")
    made.register_recipe(stores.TINY, "some/model")
    return made.uri


@pytest.fixture
def store(tmp_path, empty_store) -> Store:
    """A local store that knows two recipes; `stores.LONG` is the active one."""
    return Store.open(str(shutil.copytree(empty_store, tmp_path / "store")))


@pytest.fixture
def few_are_merged(monkeypatch):
    """Three small files are worth a merge, so that a test need not make eight."""
    monkeypatch.setattr("longvlm.pipeline.store.upkeep.compact._MIN_FILES", 3)
