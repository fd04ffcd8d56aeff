import stores

from longvlm.pipeline.store.settings import keeps_thumbnails, remember_thumbnails


def test_a_store_keeps_thumbnails_until_it_is_told_otherwise_and_writes_what_is_new(store):
    assert keeps_thumbnails(None)
    assert keeps_thumbnails(store)
    for keeps in (True, False, False, True):
        remember_thumbnails(store, keeps=keeps)
        assert keeps_thumbnails(store) == keeps
    said = stores.rows(store, "SELECT event FROM ledger_recipes WHERE event LIKE '%thumbnails' ORDER BY seq")
    assert [row["event"] for row in said] == ["no_thumbnails", "thumbnails"]
    assert stores.rows(store, "FROM recipes WHERE recipe IS NULL") == []
