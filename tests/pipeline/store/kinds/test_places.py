"""A store may lie in a folder of any name, and never reads another one."""

import re

import duckdb
import pytest
import stores

from longvlm.pipeline.store import catalog
from longvlm.pipeline.store.files import canonical
from longvlm.pipeline.store.index_file import write_index_duckdb
from longvlm.pipeline.store.ledger import Store
from longvlm.pipeline.store.query import access
from longvlm.pipeline.store.upkeep.compact import compact, merge_small_files
from longvlm.pipeline.store.upkeep.dead import dead_writes
from longvlm.pipeline.store.upkeep.erase import erase
from longvlm.pipeline.store.upkeep.vacuum import unreferenced, vacuum
from longvlm.pipeline.store.upkeep.verify import verify
from longvlm.schemas.errors import InputError
from longvlm.schemas.identity import video_id

NAMES = [
    "a%20b",
    "back\\slash",
    "tab\tand\nline",
    "q'uo\"te",
    "zero\u200bwidth",
    "write_id=7",
    "{a,b}#;::~$x",
    "e\x1b\x85",
]


def uris(store: Store) -> list[str]:
    snapshot = store.pin()
    with catalog.connect(snapshot, apart=True) as con:
        access.seal(con, snapshot)
        return [uri for (uri,) in con.execute("SELECT uri FROM live_videos ORDER BY uri").fetchall()]


@pytest.mark.parametrize("name", NAMES)
def test_a_store_lives_in_a_folder_of_any_name(tmp_path, name):
    stores.index(Store.create(str(tmp_path / name)), ["a"])
    assert uris(Store.open(str(tmp_path / name))) == [stores.uri_of("a")]
    assert len(list((tmp_path / name / "videos" / "_delta_log").glob("*.json"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.usefixtures("few_are_merged")
def test_upkeep_reaches_a_folder_of_any_name(tmp_path):
    place = tmp_path / "".join(NAMES)
    store = Store.create(str(place))
    store.register_recipe(stores.LONG, "some/model")
    for video in "abc":
        stores.index(store, [video])
    opened = Store.open(str(place))
    assert merge_small_files(opened)["videos"] > 0
    erase(opened, [video_id(stores.uri_of("a"))], "run")
    stores.index(opened, ["b"])
    compact(opened, dead_writes(opened, 0.0))
    (place / "tokens" / "stray.2.parquet").write_bytes(b"stray")
    assert "stray.2.parquet" in unreferenced(opened, "tokens", 0)
    assert vacuum(opened, 0)["files"] > 0
    assert not (place / "tokens" / "stray.2.parquet").exists()
    found = verify(opened.pin())
    assert (found.num_videos, found.damaged_files, found.problems) == (2, {}, [])
    assert uris(Store.open(str(place))) == [stores.uri_of(video) for video in "bc"]
    assert write_index_duckdb(opened.uri, opened.pin()) == place / "index.duckdb"
    assert (place / "index.duckdb").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_a_store_is_not_taken_for_the_one_that_its_name_decodes_to(tmp_path):
    stores.index(Store.create(str(tmp_path / "a b")), ["theirs"])
    assert Store.find(str(tmp_path / "a%20b")) is None
    stores.index(Store.create(str(tmp_path / "a%20b")), ["ours"])
    assert uris(Store.open(str(tmp_path / "a%20b"))) == [stores.uri_of("ours")]
    assert uris(Store.open(str(tmp_path / "a b"))) == [stores.uri_of("theirs")]


def test_index_duckdb_shows_what_is_there(tmp_path):
    store = Store.create(str(tmp_path / "q'uo%20te"))
    stores.index(store, ["a"])
    with duckdb.connect(str(write_index_duckdb(store.uri, store.pin())), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM live_videos").fetchall() == [(1,)]


@pytest.mark.parametrize("address", ["s3://bucket/a%20b", "s3://bucket/a\\b", "s3://bucket/a\tb"])
def test_a_bucket_has_no_such_names_for_stores(address):
    with pytest.raises(InputError, match="choose another prefix"):
        canonical(address)


def test_a_store_that_is_not_utf_8_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=re.escape("caf\\xe9 is not UTF-8")):
        canonical(f"{tmp_path}/caf\udce9")
