"""Tables as Delta has them: those of newer versions are refused in a sentence, by whoever opens them and whenever."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import stores
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from longvlm.pipeline.store import delta
from longvlm.pipeline.store.ledger import Store
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError

RUN = pa.Table.from_pylist([{"run_id": "r", "job": "index"}], tables.RUNS)
NEWER = r"written by a newer longvlm; upgrade with `pip install --upgrade longvlm-index`"


def set_format(store: Store, table: str, number: str) -> None:
    DeltaTable(f"{store.uri}/{table}").alter.set_table_properties({delta.FORMAT_KEY: number}, raise_if_not_exists=False)


def ask_for(store: Store, table: str, **features: list[str]) -> None:
    """Let a table's log ask for features of Delta's."""
    log = Path(store.uri, table, "_delta_log")
    protocol = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [], "writerFeatures": [], **features}
    (log / f"{len(list(log.glob('*.json'))):020}.json").write_text(json.dumps({"protocol": protocol}) + "\n")


@pytest.mark.parametrize("number", ["2", "10", "next"])
@pytest.mark.parametrize("way", [Store.open, Store.find, Store.create])
def test_a_store_of_a_newer_format_is_refused(store, number, way):
    set_format(store, "videos", number)
    with pytest.raises(InputError, match=f"videos has format {number}, .* {NEWER}"):
        way(store.uri)


def test_a_store_that_says_the_format_of_now_is_opened(store):
    set_format(store, "videos", str(delta.FORMAT))
    stores.index(Store.open(store.uri), ["a"])


def test_nothing_is_made_in_a_store_of_a_newer_format(store):
    set_format(store, "videos", "2")
    Path(store.uri, "runs").rename(Path(store.uri).parent / "runs")
    with pytest.raises(InputError, match=NEWER):
        Store.create(store.uri)
    assert not Path(store.uri, "runs").exists()


def test_each_table_may_be_of_a_newer_format(store):
    set_format(store, "runs", "2")
    opened = Store.open(store.uri)
    opened.pin(("videos", "tokens"))
    for attempt in (opened.pin, lambda: opened.append("runs", RUN)):
        with pytest.raises(InputError, match="runs has format 2"):
            attempt()


def test_a_run_under_way_neither_reads_nor_writes_a_format_that_came_since(store):
    store.append("runs", RUN)
    pinned = store.pin(("runs",)).table("runs")
    set_format(store, "runs", "2")
    for attempt in (
        store.pin,
        lambda: store.append("runs", RUN),
        lambda: store.replace_files("runs", pinned.files, []),
    ):
        with pytest.raises(InputError, match="runs has format 2"):
            attempt()


@pytest.mark.parametrize("way", [Store.open, Store.find, Store.create])
def test_features_of_delta_that_a_reader_must_have_are_told_in_a_sentence(store, way):
    features = ["timestampNtz", "crystalBall"]
    ask_for(store, "videos", readerFeatures=features, writerFeatures=features)
    with pytest.raises(InputError, match=f"crystalBall.*{NEWER}"):
        way(store.uri)


def test_features_that_came_since_are_told_to_a_run_under_way(store):
    ask_for(store, "runs", readerFeatures=["crystalBall"], writerFeatures=["crystalBall"])
    with pytest.raises(InputError, match=NEWER):
        store.pin()


def test_features_that_a_writer_must_have_keep_nobody_from_reading(store):
    ask_for(store, "runs", writerFeatures=["crystalBall"])
    opened = Store.open(store.uri)
    assert not opened.pin().table("runs").files
    for attempt in (lambda: opened.append("runs", RUN), lambda: opened.replace_files("runs", [], [])):
        with pytest.raises(InputError, match=f"crystalBall.*{NEWER}"):
            attempt()


def test_columns_that_are_there_are_not_added(store):
    handle = DeltaTable(f"{store.uri}/runs")
    wider = tables.RUNS.append(pa.field("cost", pa.float64()))
    delta.add_columns(handle, tables.RUNS)
    assert handle.version() == 0
    delta.add_columns(handle, wider)
    delta.add_columns(handle, wider)
    delta.add_columns(handle, tables.RUNS)
    assert handle.version() == 1
    assert delta.columns(handle, tables.RUNS).equals(wider)


def test_of_two_that_add_a_column_the_second_looks_again(store):
    first, second = (DeltaTable(f"{store.uri}/runs") for _ in range(2))
    wider = tables.RUNS.append(pa.field("cost", pa.float64()))
    delta.add_columns(first, wider)
    with pytest.raises(CommitFailedError):
        delta.add_columns(second, wider)
    delta.refresh(f"{store.uri}/runs", second)
    delta.add_columns(second, wider)
    assert second.version() == 1


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (
            {"AWS_ENDPOINT_URL": "http://minio:9000"},
            {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_ALLOW_HTTP": "true"},
        ),
        ({"AWS_ENDPOINT_URL_S3": "HTTP://b"}, {"AWS_ENDPOINT_URL": "HTTP://b", "AWS_ALLOW_HTTP": "true"}),
        ({"AWS_ENDPOINT_URL": "https://a", "AWS_ENDPOINT_URL_S3": "https://b"}, {}),
        ({"AWS_ENDPOINT_URL": "https://a"}, {}),
        ({}, {}),
    ],
)
def test_an_s3_service_without_tls_is_meant_where_its_address_says_so(monkeypatch, environment, told):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert delta.storage_options("s3://bucket/store/videos") == told
    assert delta.storage_options("/store/videos") == delta.storage_options("gs://bucket/store") == {}


def test_a_writer_that_is_overtaken_many_times_still_commits_and_never_waits_long(store, monkeypatch):
    waits = []
    monkeypatch.setattr(delta.time, "sleep", waits.append)

    def attempt(handle):
        if len(waits) < 30:
            store.append("recipes", pa.Table.from_pylist([{"name": str(len(waits))}], tables.RECIPES))
        delta.add_columns(handle, tables.RECIPES.append(pa.field("cost", pa.float64())))
        return handle.version()

    assert delta.Logs(store.uri).upon_newest("recipes", attempt) > 30
    assert len(waits) == 30
    assert max(waits) < 2


@pytest.mark.parametrize("is_open", [True, False])
def test_a_listing_that_shows_a_commit_and_not_the_one_before_it_is_made_again(store, monkeypatch, is_open):
    logs = delta.Logs(store.uri)
    if is_open:
        logs.handle("recipes")
    for number in range(3):
        store.append("recipes", pa.Table.from_pylist([{"name": str(number)}], tables.RECIPES))
    *_, unseen, newest = sorted(Path(store.uri, "recipes", "_delta_log").glob("*.json"))
    aside = unseen.rename(unseen.with_suffix(".aside"))
    monkeypatch.setattr(delta.time, "sleep", lambda _: aside.rename(unseen))  # the next listing shows it
    assert logs.handle("recipes").version() == int(newest.stem)


def test_a_commit_that_meets_such_a_listing_is_made_again_and_no_other_trouble_is(store, monkeypatch):
    monkeypatch.setattr(delta.time, "sleep", lambda _: None)
    met = iter([DeltaError("Expected contiguous commit files, but found gap: 3 -> 5"), DeltaError("the disk is full")])

    def attempt(_):
        raise next(met)

    with pytest.raises(DeltaError, match="the disk is full"):
        delta.Logs(store.uri).upon_newest("recipes", attempt)
    assert next(met, None) is None


@pytest.mark.parametrize("is_open", [True, False])
def test_a_commit_that_is_missing_for_good_is_told(store, monkeypatch, is_open):
    monkeypatch.setattr(delta.time, "sleep", lambda _: None)
    logs = delta.Logs(store.uri)
    if is_open:
        logs.handle("recipes")
    for number in range(3):
        store.append("recipes", pa.Table.from_pylist([{"name": str(number)}], tables.RECIPES))
    sorted(Path(store.uri, "recipes", "_delta_log").glob("*.json"))[-2].unlink()
    with pytest.raises(InputError, match="it is missing, and so is what it added"):
        logs.handle("recipes")


def test_the_files_of_a_version_are_listed_once_and_those_of_the_next_anew(store, monkeypatch):
    listed = []
    files_of = delta.data_files
    monkeypatch.setattr(delta, "data_files", lambda uri, handle: listed.append(uri) or files_of(uri, handle))
    first, again = (store.pinned("recipes") for _ in range(2))
    assert again is first
    Store.open(store.uri).append("recipes", pa.Table.from_pylist([{"name": "other"}], tables.RECIPES))
    assert {*store.pinned("recipes").files} > {*first.files}
    assert len(listed) == 2
