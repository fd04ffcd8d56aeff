"""One reader reads whatever rows a user gives: questions, labels, conversations, a manifest, videos to forget."""

import csv
import io
import json
import os

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from longvlm.jobs.operate.forget import read_uris
from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.judging.agreement import read_right_answers
from longvlm.pipeline.judging.benchmarks import BENCHMARKS, labels_benchmark, read_items
from longvlm.pipeline.source.corpus import Source, list_source
from longvlm.pipeline.training.conversations import read_conversations
from longvlm.schemas.errors import InputError

QUESTION = {"question": "Où est le café?", "video": "a.mp4", "question_id": "7"}


def manifest(path):
    listed = list_source(Source(path)).to_pylist()
    return [(row["uri"].rpartition("/")[2], row["external_id"], row["size_bytes"]) for row in listed]


def labels(path):
    items = read_items(labels_benchmark(path), path).to_pylist()
    return [(item["question"], item["video"], item["answer"]) for item in items]


def answers(path):
    fsspec.filesystem("memory").pipe_file("/asked.json", json.dumps([QUESTION]).encode())
    return [item["answer"] for item in read_items(BENCHMARKS["msvd-qa"], "memory:///asked.json", path).to_pylist()]


def right_answers(path):
    return list(read_right_answers(path, {0: {"type": "text"}}).values())


def conversations(path):
    return [(row["video"], row["turns"][0]["question"]) for row in read_conversations(path).to_pylist()]


def asked(path):
    return [tuple(row[name] for name in QUESTION) for row in read_questions(path).to_pylist()]


# By what sentences call the file: what reads it, a row of text, and what is read of it.
READERS = {
    "question file": (asked, QUESTION, ("Où est le café?", "a.mp4", "7")),
    "label file": (labels, {**QUESTION, "answer": "là"}, ("Où est le café?", "a.mp4", "là")),
    "answer file": (answers, {"question_id": "7", "answer": "là"}, "là"),
    "conversation file": (conversations, {"video_id": "é.mp4", "q": "Où?", "a": "là"}, ("é.mp4", "Où?")),
    "manifest": (manifest, {"uri": "é.mp4", "external_id": "x", "size": "5"}, ("é.mp4", "x", 5)),
    "list of videos": (read_uris, {"uri": "é.mp4", "n": "1"}, "é.mp4"),
}
TEXTS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
every_reader = pytest.mark.parametrize("kind", READERS)


def text_of(rows, ending):
    if ending in (".json", ".jsonl", ".ndjson"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return f"[{', '.join(lines)}]" if ending == ".json" else "\n".join(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter="\t" if ending == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def bytes_of(rows, ending):
    if ending != ".parquet":
        return text_of(rows, ending).encode()
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@every_reader
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", TEXTS)
def test_text_is_read_in_each_encoding_of_unicode_s_own(tmp_path, kind, encoding, ending):
    read, row, wanted = READERS[kind]
    mark = "" if encoding.startswith("utf-8") else "\ufeff"
    (tmp_path / f"f{ending}").write_bytes(f"{mark}{text_of([row], ending)}".encode(encoding))
    assert read(str(tmp_path / f"f{ending}")) == [wanted]


@every_reader
@pytest.mark.parametrize("name", ["f.CSV", "f.Json", "f.JSONL", "f.Parquet"])
def test_endings_may_have_capitals_and_files_lie_anywhere(tmp_path, kind, name):
    read, row, wanted = READERS[kind]
    content = bytes_of([row], name[1:].lower())
    (tmp_path / name).write_bytes(content)
    fsspec.filesystem("memory").pipe_file(f"/{kind}/{name}", content)
    for path in (str(tmp_path / name), f"file://{tmp_path}/{name}", f"memory:///{kind}/{name}"):
        assert read(path) == [wanted]


@every_reader
@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl"])
@pytest.mark.parametrize(
    ("bytes_of_text", "says"),
    [
        (lambda text: text.encode("utf-16-le"), "is not UTF-8 text: it has a zero byte, as UTF-16 without a mark"),
        (lambda text: text.encode("utf-32"), "is UTF-32, and not UTF-8 text; save it as UTF-8"),
        (lambda text: text.encode("utf-16")[:-1], "begins as UTF-16 and is broken after line .*save it as UTF-8"),
        (lambda _: b"\x1f\x8b\x08\0rest", "is compressed by gzip"),
        (lambda _: b"PK\x03\x04rest", "is a zip archive"),
        (lambda _: b"PAR1rest", "is parquet, and not"),
        (lambda _: b"", "is empty"),
        (lambda _: b"\xef\xbb\xbf\n \n", "is empty"),
    ],
    ids=["no mark", "utf-32", "half a character", "gzip", "zip", "parquet", "nothing", "blank"],
)  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, kind, ending, bytes_of_text, says):
    read, row, _ = READERS[kind]
    path = tmp_path / f"f{ending}"
    path.write_bytes(bytes_of_text(text_of([acute(row)], ending)))
    refused(read, str(path), f"the {kind} {path} {says}")


# A row of a manifest speaks for itself alone: tests/pipeline/source/test_manifest.py.
read_as_a_whole = pytest.mark.parametrize("kind", [kind for kind in READERS if kind != "manifest"])


@read_as_a_whole
@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl"])
def test_text_in_another_encoding_is_refused(tmp_path, kind, ending):
    read, row, _ = READERS[kind]
    path = tmp_path / f"f{ending}"
    path.write_bytes(text_of([acute(row)], ending).encode("latin-1"))
    refused(read, str(path), f"the {kind} {path} is not UTF-8 text: it has the byte 0xE9, .* has for 'é'; save it")


@read_as_a_whole
def test_half_a_surrogate_pair_is_refused(tmp_path, kind):
    read, row, _ = READERS[kind]
    (tmp_path / "half.jsonl").write_text(text_of([acute(row)], ".jsonl").replace("é", "\\ud800"))
    refused(read, str(tmp_path / "half.jsonl"), "cannot be stored")


def acute(row):
    """A row whose only letter beyond ASCII is é."""
    return {name: value.replace("ù", "é").replace("à", "é") for name, value in row.items()}


def refused(read, path, says):
    with pytest.raises(InputError, match=says) as caught:
        read(path)
    assert "\n" not in str(caught.value)


FAULTS = {
    "ragged.csv": (lambda text: f"{text}x\r\n", "row 2 of FILE has 1 cells, but the header has"),
    "wide.csv": (lambda text: f"{text.splitlines()[0]}\n{'x,' * 9}x\n", "row 1 of FILE has 10 cells, but the header"),
    "twice.csv": (lambda text: text + text, "row 2 of FILE is the header once more; remove it"),
    "open.csv": (lambda text: f'{text}"x\n', r"row that begins in line 3 of FILE is not CSV \(unexpected end of"),
    "quote.csv": (lambda text: f'{text}"x"y\n', "the row that begins in line 3 of FILE is not CSV"),
    "rows.json": (lambda text: text[:-1], "FILE is not JSON"),
    "object.json": (lambda _: "{}", "FILE must hold a list of rows"),
    "deep.json": (lambda _: "[" * 100_000, r"FILE is not JSON \(it is nested too deeply"),
    "line.jsonl": (lambda text: f"{text}\n\n{{", "line 3 of FILE is not JSON"),
    "text.jsonl": (lambda text: f'{text}\n"x"', "row 2 of .* is not an object"),
}  # fmt: skip


@every_reader
@pytest.mark.parametrize("name", FAULTS)
def test_broken_text_is_told_with_its_place(tmp_path, kind, name):
    read, row, _ = READERS[kind]
    spoil, says = FAULTS[name]
    path = tmp_path / name
    path.write_text(spoil(text_of([acute(row)], path.suffix)))
    refused(read, str(path), says.replace("FILE", f"the {kind} {path}"))


@every_reader
def test_a_column_that_is_there_twice_is_refused_if_it_is_read(tmp_path, kind):
    read, row, wanted = READERS[kind]
    column = next(iter(row))
    table = pa.Table.from_pylist([row])
    csv_lines = text_of([row], ".csv").splitlines()
    for extra, twice in ((column, True), ("other", False)):
        both = pa.Table.from_arrays([*table.columns, *[table[column]] * 2], [*table.column_names, extra, extra])
        parquet.write_table(both, tmp_path / "f.parquet")
        (tmp_path / "f.csv").write_text(f"{csv_lines[0]},{extra}, {extra}\n{csv_lines[1]},1,2\n")
        for path in map(str, (tmp_path / "f.parquet", tmp_path / "f.csv")):
            if twice:
                refused(read, path, f"the {kind} {path} has 3 columns {column}; keep one")
            else:
                assert read(path) == [wanted]


@every_reader
@pytest.mark.parametrize("damage", ["truncated", "text", "nothing", "page"])
def test_broken_parquet_is_told(tmp_path, kind, damage):
    read, row, _ = READERS[kind]
    whole = bytes_of([row] * 100, ".parquet")
    contents = {"truncated": whole[:-20], "text": b"uri\na.mp4\n", "nothing": b""}
    (tmp_path / "f.parquet").write_bytes(contents.get(damage, whole[:4] + bytes(60) + whole[64:]))
    refused(read, str(tmp_path / "f.parquet"), rf"the {kind} .*f\.parquet cannot be read as parquet \(.*\)\.")


@every_reader
def test_files_that_are_not_there_or_no_files(tmp_path, kind, s3):
    read, row, wanted = READERS[kind]
    gone = str(tmp_path / "gone.csv")
    refused(read, gone, f"{gone} does not exist; check the address")
    refused(read, "s3://bucket/gone.csv", "s3://bucket/gone.csv does not exist")
    refused(read, "carrier-pigeon://x/f.csv", "cannot open carrier-pigeon://x/f.csv")
    (tmp_path / "folder.csv").mkdir()
    s3.put_object(Bucket="bucket", Key="folder.csv/f.csv", Body=bytes_of([row], ".csv"))
    if kind != "manifest":  # a source may be a folder, whatever it is called
        refused(read, str(tmp_path / "folder.csv"), r"folder\.csv is a folder; name a file")
        refused(read, "s3://bucket/folder.csv", r"folder\.csv is a folder; name a file")
    assert read("s3://bucket/folder.csv/f.csv") == [wanted]


@every_reader
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path, kind):
    path = tmp_path / "f.csv"
    path.touch(mode=0)
    refused(READERS[kind][0], str(path), "is forbidden")


@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in ("manifest", "list of videos")])
def test_an_ending_of_no_known_kind(tmp_path, kind):
    refused(
        READERS[kind][0], str(tmp_path / "f.csv.gz"), r"must end in one of \.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.p"
    )


@pytest.mark.parametrize("ending", [".csv", ".json", ".jsonl", ".parquet"])
def test_numbers_of_columns_with_gaps_are_what_they_were_before(tmp_path, ending):
    """As pandas writes them, which knows no gaps in a column of integers."""
    import pandas as pd

    def written(name, **columns):
        path = tmp_path / f"{name}{ending}"
        frame = pd.DataFrame(columns)
        rows = frame.to_dict("records")
        write = {
            ".csv": lambda: frame.to_csv(path, index=False),
            ".json": lambda: path.write_text(json.dumps(rows)),
            ".jsonl": lambda: path.write_text("\n".join(map(json.dumps, rows))),
            ".parquet": lambda: frame.to_parquet(path),
        }
        write[ending]()
        return str(path)

    gap = float("nan")
    seventeen = "17.0" if ending == ".csv" else "17"  # a text stays as it stands
    listed = manifest(written("m", uri=["a.mp4", "b.mp4"], size=[1234.0, gap], external_id=[17.0, gap]))
    assert listed == [("a.mp4", seventeen, 1234), ("b.mp4", None, None)]
    told = asked(written("q", question=["What?", "Why?"], video=[17.0, gap], question_id=[17, 18]))
    assert told == [("What?", seventeen, "17"), ("Why?", None, "18")]
    said = written("l", question=["What?", "Why?"], video=[17, 18], answer=[17.0, 2.5], id=[gap, 1.0])
    assert labels(said) == [("What?", "17", seventeen), ("Why?", "18", "2.5")]
    told = read_conversations(written("c", video_id=[17.0, 18.0], q=["Q"] * 2, a=["A"] * 2, id=[17.0, gap]))
    first = told.to_pylist()[0]
    assert (first["video"], first["id"], told["id"][1].as_py()) == (*[seventeen] * 2, "2")


def test_right_answers_have_the_gaps_of_their_file(tmp_path):
    (tmp_path / "q.jsonl").write_bytes('\ufeff{"question": "a", "answer": NaN}'.encode("utf-16-be"))
    assert right_answers(str(tmp_path / "q.jsonl")) == [None]
    (tmp_path / "q.TSV").write_text("question\tanswer\nWhat?\tone, two\n")
    assert right_answers(str(tmp_path / "q.TSV")) == ["one, two"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_plain_list_of_uris_is_text_too(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("é\u2028.mp4\r\n\r\n b.mp4 \n".encode(encoding))
    assert read_uris(str(path)) == ["é\u2028.mp4", "b.mp4"]
    path.write_bytes("a.mp4\né.mp4\n".encode("latin-1"))
    refused(read_uris, str(path), f"line 2 of the list of videos {path} is not UTF-8 text: it has the byte 0xE9")
    refused(read_uris, str(tmp_path), "is a folder; name a file")
