import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference_outputs import read_json

from longvlm.pipeline import table_files
from longvlm.pipeline.answering.questions import QUESTION_COLUMNS, TEXTS
from longvlm.pipeline.table_files import Column, is_table, read_batches, read_rows, text_of
from longvlm.pipeline.text_files import UserFile
from longvlm.schemas.errors import InputError
from support import GOLDENS, missing

ROWS = [
    {"question_id": "7", "question": "What, exactly?", "video": "a/b.mp4", "choices": '["a","b"]', "schema": None},
    {"question_id": None, "question": "Où est\n le café ☕?", "video": None, "choices": None, "schema": '{"a":1}'},
]
WANTED = [dict.fromkeys(TEXTS.names) | row for row in ROWS]
CSV = """question_id,question,video,choices,schema
7,"What, exactly?",a/b.mp4,"[""a"",""b""]",
,"Où est
 le café ☕?",,,"{""a"":1}"
"""


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def batches(path, columns=QUESTION_COLUMNS):
    return list(read_batches(UserFile(path, "question file"), columns))


def rows(path):
    return [row for batch in batches(path) for row in batch.to_pylist()]


def column(path, name):
    return [row[name] for row in rows(path)]


def test_the_same_rows_from_every_format(written):
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert rows(written("q.jsonl", lines + "\n\n")) == WANTED
    assert rows(written("q.json", json.dumps(ROWS))) == WANTED
    assert rows(written("q.csv", CSV)) == WANTED
    assert rows(written("windows.csv", CSV.replace("\n", "\r\n").replace("Où est\r", "Où est"))) == WANTED
    assert rows(written("bom.csv", b"\xef\xbb\xbf" + CSV.encode())) == WANTED
    assert rows(written("bom.jsonl", b"\xef\xbb\xbf" + lines.encode())) == WANTED
    assert rows(written("q.parquet", pa.Table.from_pylist(ROWS))) == WANTED


def test_lists_and_objects_are_as_good_as_their_text(written):
    row = ROWS[0] | {"choices": ["a", "b"], "schema": {"a": 1}}
    (found,) = rows(written("q.jsonl", json.dumps(row)))
    assert (found["choices"], found["schema"]) == ('["a","b"]', '{"a":1}')
    assert column(written("q.parquet", pa.Table.from_pylist([ROWS[0] | {"choices": ["a", "b"]}])), "choices") == [
        ["a", "b"]
    ]


@pytest.mark.parametrize("number", [7, -1, 2**53 + 1])
def test_numbers_that_serve_as_ids_become_text_as_they_are_written(written, number):
    row = {"question_id": number, "question": "What?", "video": number}
    for path in (
        written("q.jsonl", json.dumps(row)),
        written("q.parquet", pa.Table.from_pylist([row])),
        written("q.csv", f"question_id,question,video\n{number},What?,{number}\n"),
    ):
        assert column(path, "question_id") == column(path, "video") == [str(number)]
    assert column(written("q.csv", "question_id,question\n007,What?\n"), "question_id") == ["007"]
    assert column(written("q.jsonl", '{"question_id": 0, "question": "What?"}'), "question_id") == ["0"]


def test_dictionaries_of_parquet_are_text(written):
    table = pa.table({"question": pa.array(["What?", "Why?", "What?"]).dictionary_encode(), "video": [1, None, 3]})
    assert column(written("q.parquet", table), "question") == ["What?", "Why?", "What?"]


def test_a_row_has_the_first_of_a_column_s_names_that_holds_something(written):
    table = pa.table({"video_name": ["c", "c", "c"], "video_id": [None, "b", "b"], "video": ["a", None, "a"]})
    for path in (
        written("q.parquet", table.append_column("Q", pa.array(["What?"] * 3))),
        written("q.json", json.dumps([row | {"Q": "What?"} for row in table.to_pylist()])),
    ):
        assert column(path, "video") == ["a", "b", "a"]


def test_what_stands_in_other_columns_does_not_matter(written):
    row = '{"question": "What?", "score": NaN, "answer": "\\ud800", "n": 1e999}'
    assert column(written("q.jsonl", row), "question") == column(written("q.json", f"[{row}]"), "question") == ["What?"]


def test_videochatgpt_s_two_layouts(written):
    generic = [{"Q": "What?", "A": "A dog.", "video_name": "v_1"}, {"Q": "Why?", "A": "So.", "video_name": "v_1"}]
    assert [(q["question"], q["video"]) for q in rows(written("generic.json", json.dumps(generic)))] == [
        ("What?", "v_1"),
        ("Why?", "v_1"),
    ]
    qa = [{"video_id": "v_1", "question_id": "v_1_0", "question": "What?", "answer": "A dog."}]
    (row,) = rows(written("qa.json", json.dumps(qa)))
    assert (row["question_id"], row["question"], row["video"]) == ("v_1_0", "What?", "v_1")


@pytest.mark.parity
def test_the_reference_s_ground_truth_rows(written):
    truth = read_json("inference_qa_golden.json").get("gt") or missing(GOLDENS, "ground truth")
    read = rows(written("gt.json", json.dumps(truth)))
    assert [(q["video"], q["question_id"], q["question"]) for q in read] == [
        (row["video_id"], row["question_id"], row["question"]) for row in truth
    ]


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "q.csv", "q.parquet"])
def test_files_of_many_rows_come_in_batches(written, monkeypatch, name):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 3)
    many = [{"question": f"What\nof {i}?"} for i in range(10)]
    contents = {
        "q.jsonl": "\n".join(map(json.dumps, many)),
        "q.json": json.dumps(many),
        "q.csv": "question\n\n" + "\n".join(f'"{row["question"]}"\n' for row in many),
        "q.parquet": pa.Table.from_pylist(many),
    }
    path = written(name, contents[name])
    assert [len(batch) for batch in batches(path)] == [3, 3, 3, 1]
    assert column(path, "question") == [row["question"] for row in many]


def test_a_csv_file_is_read_as_its_rows_are_taken(written, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 3)
    path = written("q.csv", "question\n" + "What?\n" * 6 + '"broken')
    read = read_batches(UserFile(path, "question file"), QUESTION_COLUMNS)
    assert len(next(read)) == len(next(read)) == 3
    with pytest.raises(InputError, match=r"the row that begins in line 8 of the question file .* is not CSV"):
        next(read)


def test_columns_that_nobody_asks_for_are_not_read_but_counted(written):
    for path in (written("q.csv", "n,m\n1,2\n3,4\n"), written("q.parquet", pa.table({"n": [1, 2]}))):
        assert [row for batch in batches(path, {"x": Column(("x",))}) for row in batch.to_pylist()] == [{"x": None}] * 2


def test_rows_keep_what_is_nested_in_them(written):
    row = {"id": 7, "turns": [{"from": "human", "value": "What?"}], "other": 1}
    paths = written("r.json", json.dumps([row])), written("r.parquet", pa.Table.from_pylist([row]))
    for path in paths:
        assert list(read_rows(UserFile(path, "file"), ["id", "turns"])) == [{"id": 7, "turns": row["turns"]}]
    assert list(read_rows(UserFile(written("r.csv", "id,other\n7,\n"), "file"), ["id"])) == [{"id": "7"}]


@pytest.mark.parametrize(
    ("value", "text"),
    [(17.0, "17"), (-0.0, "0"), (1e20, "1" + "0" * 20), (123456789012.0, "123456789012"), (2.5, "2.5"), (7, "7"),
     (True, "true"), ("17.0", "17.0"), ([1.0], "[1.0]"), (float("nan"), None), (None, None), ("", "")],
)  # fmt: skip
def test_the_text_of_a_cell(value, text):
    assert text_of(value) == text


def test_floats_are_the_same_text_in_every_kind_of_file(written):
    for value in (17.0, 2.5, 1e20, 123456789012.0):
        row = {"question": "What?", "video": value}
        for path in (written("q.jsonl", json.dumps(row)), written("q.parquet", pa.Table.from_pylist([row]))):
            assert column(path, "video") == [text_of(value)]
    for path in (
        written("q.jsonl", '{"question": "a", "video": 1e999}'),
        written("q.parquet", pa.table({"question": ["a"], "video": [float("inf")]})),
    ):
        with pytest.raises(InputError, match=r"the video in row 1 of .* cannot be stored"):
            rows(path)


def counts(path):
    file = UserFile(path, "manifest")
    return [n for batch in read_batches(file, {"size": Column(("size",), "count")}) for n in batch["size"].to_pylist()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("cell", "number"),
    [(1234, 1234), (1234.0, 1234), ("1234.0", 1234), (" 12 ", 12), ("1e+05", 100_000), (0, 0), (2**63 - 1, 2**63 - 1),
     (float("nan"), None), ("NA", None), ("null", None), (None, None)],
)  # fmt: skip
def test_counts_however_they_are_written(written, kind, cell, number):
    assert counts(one_cell(written, kind, cell)) == [number]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("cell", [-5, -5.0, 12.5, "large", "12 MB", "-1", "1e30", "inf", "0x10", 2**64 - 1, True])
def test_counts_that_are_none_are_refused_with_their_row(written, kind, cell):
    with pytest.raises(
        InputError, match=r"row 1 of the manifest .* has the size '.*', which is no whole number from 0"
    ):
        counts(one_cell(written, kind, cell))


def one_cell(written, kind, cell):
    if kind == "parquet":
        large = isinstance(cell, int) and cell > 2**63
        return written("m.parquet", pa.table({"size": pa.array([cell], pa.uint64() if large else None)}))
    if kind == "csv":
        return written("m.csv", f"uri,size\na,{'' if cell is None else cell}\n")
    return written("m.jsonl", json.dumps({"size": cell}))


def test_the_row_of_a_bad_cell_counts_from_the_file_s_beginning(written, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 2)
    sizes = [{"size": size} for size in (1, 2, 3, -4)]
    for path in (
        written("m.jsonl", "\n".join(map(json.dumps, sizes))),
        written("m.csv", "size\n1\n2\n3\n-4\n"),
        written("m.parquet", pa.Table.from_pylist(sizes)),
    ):
        with pytest.raises(InputError, match="row 4 of the manifest"):
            counts(path)


def test_which_addresses_are_files_of_rows():
    assert all(map(is_table, ("a.csv", "/x/a.TSV", "s3://b/a.Json", "a.jsonl", "a.ndjson", "a.b.PARQUET")))
    assert not any(map(is_table, ("a.txt", "a.csv.gz", "csv", "/x.csv/a", "")))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("q.csv", "query,video\nWhat?,a\n", r"q\.csv has no column question; it has query, video"),
        ("q.jsonl", '{"question": "a"}\n\n{"question": \n', r"line 3 of .*q\.jsonl is not JSON"),
        ("q.jsonl", '{"question": 3}', "row 1 of .* has no text in its column question, but 3"),
        ("q.jsonl", "[" * 9999, r"line 1 of .*q\.jsonl is not JSON \(it is nested too deeply"),
        ("q.jsonl", "[1]", "row 1 of .* is not an object"),
        ("q.jsonl", '{"question": "a"}\n{"question": "b", "video": ["c"]}', "row 2 of .* has a video that is not a te"),
        ("q.jsonl", '{"question": "\\ud800"}', "the question in row 1 of .* cannot be stored"),
        ("q.jsonl", '{"question": "a", "choices": ["\\ud800"]}', "the choices in row 1 of .* cannot be stored"),
        ("q.jsonl", b'{"question": "caf\xe9"}', r"q\.jsonl is not UTF-8"),
        ("q.json", b'[{"question": "caf\xe9"}]', r"q\.json is not UTF-8"),
        ("q.json", '{"question": "a"}', "must hold a list of rows"),
        ("q.json", "[{", r"q\.json is not JSON"),
        ("q.csv", "question,video\na,b,c\n", r"row 1 of .*q\.csv has 3 cells, but the header has 2"),
        ("q.csv", b"question\ncaf\xe9\n", r"q\.csv is not UTF-8"),
        ("q.parquet", "text", r"q\.parquet cannot be read as parquet"),
        ("q.parquet", pa.table({"query": ["What?"]}), "has no column question; it has query"),
        ("q.parquet", pa.table({"question": ["a"], "video": [["b"]]}), "column video .* is of type list<.*as text"),
        ("q.parquet", pa.table({"question": ["a"], "schema": [{"b": 1}]}), "column schema .* is of type struct<"),
        ("q.parquet", pa.table({"question": [b"\xff"]}), "the question in row 1 of .* cannot be stored"),
        ("q.parquet", pa.table({"question": [7]}), "column question .* is of type int64; write it as text"),
        ("q.txt", "What?", r"q\.txt must end in one of \.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.parquet"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(written, name, content, sentence):
    path = written(name, content)
    with pytest.raises(InputError, match=sentence) as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def test_large_types_and_dictionaries_of_parquet_are_read_like_others(written):
    table = pa.table(
        {
            "question": pa.array(["What?"], pa.large_string()),
            "video": pa.array([17.0]).dictionary_encode(),
            "choices": pa.array([["a", "b"]], pa.large_list(pa.large_string())),
        }
    )
    (row,) = rows(written("q.parquet", table))
    assert (row["question"], row["video"], row["choices"]) == ("What?", "17", ["a", "b"])


def test_lists_of_parquet_are_json_where_json_is_asked_for(written):
    path = written("q.parquet", pa.table({"answer": [[1, 2], None]}))
    (batch,) = batches(path, {"answer": Column(("answer",), "json")})
    assert batch["answer"].to_pylist() == ["[1,2]", None]
