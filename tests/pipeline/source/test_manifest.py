import json
import threading

import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from pyarrow import csv, parquet
from servers import FileServer

from longvlm.pipeline.source import manifest
from longvlm.pipeline.source.corpus import Source, list_pages, list_source
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import LISTING


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "sub/b.mkv", "noise"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listing_of(path, **patterns):
    listing = list_source(Source(str(path), **patterns))
    assert listing.schema == LISTING
    return listing.to_pylist()


def test_csv_with_relative_paths_and_ids(folder):
    path = folder / "list.csv"
    path.write_text(f"external_id,uri\n007,a.mp4\n008,{folder}/sub/b.mkv\n009,gone.mp4\n")
    a, gone, b = listing_of(path)
    assert (a["uri"], a["external_id"], a["size_bytes"]) == (str(folder / "a.mp4"), "007", 5)
    assert a["modified_at"] is not None
    assert a["source"] == str(path)
    assert (gone["uri"], gone["size_bytes"], gone["modified_at"]) == (str(folder / "gone.mp4"), None, None)
    assert b["external_id"] == "008"


def test_parquet_with_etags_is_taken_at_its_word(folder):
    table = pa.table({"uri": ["s3://elsewhere/x.mp4", "a.mp4"], "etag": ["e1", None], "size": [10, 5]})
    parquet.write_table(table, folder / "list.parquet")
    a, x = listing_of(folder / "list.parquet")
    assert (x["uri"], x["etag"], x["size_bytes"], x["external_id"]) == ("s3://elsewhere/x.mp4", "e1", 10, None)
    assert (a["uri"], a["etag"], a["size_bytes"]) == (str(folder / "a.mp4"), None, 5)


def test_any_file_may_be_named_but_patterns_hold(folder):
    (folder / "list.csv").write_text("uri\nnoise\na.mp4\nsub/b.mkv\n")
    assert len(listing_of(folder / "list.csv")) == 3
    assert [row["uri"] for row in listing_of(folder / "list.csv", include=("sub/*",))] == [str(folder / "sub/b.mkv")]
    assert len(listing_of(folder / "list.csv", exclude=("*.mp4",))) == 2


def test_twice_the_same_is_listed_once(folder):
    (folder / "list.csv").write_text("uri\na.mp4\n./a.mp4\n")
    assert len(listing_of(folder / "list.csv")) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,id\na.mp4,1\n", r"the manifest .*list\.csv has no column uri; it has path, id"),
        ("uri,external_id\na.mp4,1\n,2\n", r"row 2 of the manifest .*list\.csv has no uri"),
        ("uri,external_id\na.mp4,1\na.mp4,2\n", "twice, as 1 and as 2"),
        ("uri,size\na.mp4,large\n", "row 1 of .* has the size 'large', which is no whole number"),
        ("uri,size\na.mp4,1\nb.mp4,-1\n", "row 2 of .* has the size '-1', which is no whole number"),
        ("uri\n", "nothing to index"),
        ("", r"the manifest .*list\.csv is empty"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_a_sentence(folder, content, words):
    (folder / "list.csv").write_text(content)
    with pytest.raises(InputError, match=words):
        listing_of(folder / "list.csv")


def test_parquet_that_is_none(folder):
    (folder / "list.parquet").write_text("uri")
    with pytest.raises(InputError, match="cannot be read"):
        listing_of(folder / "list.parquet")


@pytest.mark.parametrize("entry", ["/etc/passwd", "file:///etc/passwd", "file://../x.mp4"])
def test_a_manifest_in_a_bucket_names_no_local_files(s3, entry):
    s3.put_object(Bucket="bucket", Key="list.csv", Body=f"uri,size\na.mp4,1\n{entry},1\n".encode())
    bad, good = listing_of("s3://bucket/list.csv")
    assert (good["uri"], good["error_code"]) == ("s3://bucket/a.mp4", None)
    assert (bad["uri"], bad["error_code"]) == (entry, "bad_entry")
    assert bad["error"].startswith("In row 2 of the manifest s3://bucket/list.csv: it names a file of the machine")


@pytest.mark.parametrize(
    ("entry", "written"),
    [
        ("s3://KEY:SECRET@bucket/a.mp4", "s3://...bucket/a.mp4"),
        ("https://host/a.mp4?X-Amz-Signature=SECRET", "https://host/a.mp4..."),
        ("local:///etc/passwd", "local:///etc/passwd"),
        ("filecache::file:///etc/passwd", "filecache::file:///etc/passwd"),
        ("carrier-pigeon://a.mp4", "carrier-pigeon://a.mp4"),
    ],
)
def test_an_address_that_no_source_may_have_fails_alone_and_keeps_its_secret(folder, entry, written):
    (folder / "list.csv").write_text(f"uri,size\na.mp4,5\n{entry},1\nsub/b.mkv,9\n")
    rows = {row["uri"]: row for row in listing_of(folder / "list.csv")}
    bad = rows.pop(written)
    assert [row["error_code"] for row in rows.values()] == [None, None]
    assert (bad["error_code"], bad["size_bytes"]) == ("bad_entry", 1)
    assert bad["error"].startswith(f"In row 2 of the manifest {folder}/list.csv: ")
    assert "SECRET" not in str(bad)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_nul_is_the_trouble_of_its_row(folder, ending):
    names = ["a.mp4", "nul\0.mp4", "sub/b.mkv"]
    if ending == "parquet":
        parquet.write_table(pa.table({"uri": names}), folder / "list.parquet")
    elif ending == "csv":
        (folder / "list.csv").write_text("\n".join(["uri", *names]))
    else:
        (folder / "list.jsonl").write_text("\n".join(json.dumps({"uri": name}) for name in names))
    found = {row["uri"]: row["error"] for row in listing_of(folder / f"list.{ending}")}
    assert found.pop("nul\\x00.mp4").startswith(
        f"In row 2 of the manifest {folder}/list.{ending}: its address has a NUL"
    )
    assert found == {str(folder / "a.mp4"): None, str(folder / "sub/b.mkv"): None}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet", "binary.parquet"])
@pytest.mark.parametrize("column", ["uri", "external_id"])
def test_what_is_not_utf8_is_the_trouble_of_its_row(folder, column, ending):
    bad = {"uri": b"b.mp4", "external_id": b"2", column: b"caf\xe9"}
    rows = [{"uri": b"a.mp4", "external_id": b"1"}, bad, {"uri": b"sub/b.mkv", "external_id": b"3"}]
    if ending.endswith("parquet"):
        columns = {name: pa.array([row[name] for row in rows]) for name in bad}
        if ending == "parquet":  # as writers that do not look write a text
            columns = {name: pa.StringArray.from_buffers(3, *cells.buffers()[1:]) for name, cells in columns.items()}
        parquet.write_table(pa.table(columns), folder / f"list.{ending}")
    elif ending == "csv":
        (folder / "list.csv").write_bytes(b"uri,external_id\n" + b"\n".join(b",".join(row.values()) for row in rows))
    else:
        lines = [b'{"uri": "%s", "external_id": "%s"}' % tuple(row.values()) for row in rows]
        content = b"\n".join(lines) if ending == "jsonl" else b"[\n" + b",\n".join(lines) + b"\n]"
        (folder / f"list.{ending}").write_bytes(content)
    found = {row["external_id"]: row for row in listing_of(folder / f"list.{ending}")}
    told = found.pop("caf\\xe9" if column == "external_id" else "2")
    assert told["uri"] == ("caf\\xe9" if column == "uri" else "b.mp4")
    assert told["error"].startswith(f"In row 2 of the manifest {folder}/list.{ending}: its {column} is not UTF-8")
    assert {row["uri"]: row["error"] for row in found.values()} == {
        str(folder / "a.mp4"): None,
        str(folder / "sub/b.mkv"): None,
    }


def test_names_that_lead_nowhere_are_left_to_be_found_out(folder):
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "list.csv").write_text(f"uri\n{'x' * 300}.mp4\na.mp4/b.mp4\nloop.mp4\n")
    assert [row["error_code"] for row in listing_of(folder / "list.csv")] == [None] * 3


def test_a_time_that_no_calendar_has_is_the_trouble_of_its_row(folder, monkeypatch):
    info = LocalFileSystem.info
    monkeypatch.setattr(LocalFileSystem, "info", lambda self, path, **_: info(self, path) | {"mtime": 1e12})
    (folder / "list.csv").write_text("uri,size\na.mp4,5\nsub/b.mkv,\n")
    a, b = listing_of(folder / "list.csv")
    assert (a["error_code"], b["error_code"]) == (None, "bad_entry")
    assert "row 2 of" in b["error"]


def test_manifest_in_a_bucket(s3):
    s3.put_object(Bucket="bucket", Key="lists/all.csv", Body=b"uri\n../videos/a.mp4\nb.mp4\n")
    s3.put_object(Bucket="bucket", Key="lists/b.mp4", Body=b"12345")
    uris = {row["uri"]: row["size_bytes"] for row in listing_of("s3://bucket/lists/all.csv")}
    assert uris["s3://bucket/lists/b.mp4"] == 5


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_long_manifest_comes_a_thousand_rows_at_a_time(folder, ending):
    table = pa.table({"uri": [f"s3://b/{i}.mp4" for i in range(2500)], "size": [float(i) for i in range(2500)]})
    write = csv.write_csv if ending == "csv" else parquet.write_table
    write(table, folder / f"list.{ending}")
    pages = list(list_pages(Source(str(folder / f"list.{ending}"))))
    assert [len(page) for page in pages] == [1000, 1000, 500]
    assert pa.concat_tables(pages)["size_bytes"].to_pylist() == list(range(2500))


def test_a_manifest_of_any_kind_covers_its_own_folder(folder):
    for name in ("list.csv", "list.JSONL"):
        covers = Source(str(folder / name), include=("sub/*",)).coverage()
        assert covers(str(folder / "sub/b.mkv"))
        assert not covers(str(folder / "a.mp4"))


def test_names_with_colons_and_tildes_are_names(folder):
    for name in ("a:b.mp4", "C:\\a.mp4", "~"):
        (folder / name).write_bytes(b"12345")
    (folder / "list.json").write_text('[{"uri": "a:b.mp4"}, {"uri": "C:\\\\a.mp4"}, {"uri": "~"}]')
    assert [row["uri"] for row in listing_of(folder / "list.json")] == sorted(
        str(folder / name) for name in ("a:b.mp4", "C:\\a.mp4", "~")
    )
    assert {row["size_bytes"] for row in listing_of(folder / "list.json")} == {5}


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_an_entry_that_cannot_be_looked_up_speaks_for_itself_alone(folder, status):
    """It is listed, to fail with its reason; what a server says of it is known when it is watched."""
    with FileServer(lambda _, path: (status if path == "/bad.mp4" else 200, {"ETag": '"e"'}, b"content")) as server:
        (folder / "list.csv").write_text(f"uri\n{server.url}/a.mp4\n{server.url}/bad.mp4\n")
        a, bad = listing_of(folder / "list.csv")
    assert (a["etag"], a["size_bytes"]) == ("e", 7)
    assert (bad["uri"], bad["size_bytes"]) == (f"{server.url}/bad.mp4", None)


def test_an_entry_whose_server_does_not_answer_is_not_waited_for(folder, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(manifest, "ANSWER_S", 0.1)
    with FileServer(lambda *_: (200, {}, b"") if ended.wait() else None) as server:
        (folder / "list.csv").write_text(f"uri\na.mp4\n{server.url}/b.mp4\n")
        a, b = listing_of(folder / "list.csv")
        ended.set()
    assert (a["size_bytes"], b["size_bytes"]) == (5, None)


def test_the_manifest_that_is_out_of_reach_is_told_by_its_server():
    with FileServer(lambda *_: (500, {}, b"")) as server, pytest.raises(InputError, match="the server answered 500"):
        list_source(Source(f"{server.url}/list.csv"))
