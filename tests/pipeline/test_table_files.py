import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longvlm.pipeline import table_files
from longvlm.pipeline.table_files import TEXTS, read_batches
from longvlm.schemas.errors import InputError

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


def rows(path):
    return [row for batch in read_batches(path) for row in batch.to_pylist()]


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
def test_the_reference_s_ground_truth_rows(goldens, written):
    files = list(goldens.glob("inference_qa_golden.json"))
    assert files
    truth = json.loads(files[0].read_text())["gt"]
    read = rows(written("gt.json", json.dumps(truth)))
    assert [(q["video"], q["question_id"], q["question"]) for q in read] == [
        (row["video_id"], row["question_id"], row["question"]) for row in truth
    ]


def test_files_of_many_rows_come_in_batches(written, monkeypatch):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 3)
    many = [{"question": f"What of {i}?"} for i in range(10)]
    for path in (
        written("q.jsonl", "\n".join(map(json.dumps, many))),
        written("q.parquet", pa.Table.from_pylist(many)),
    ):
        assert [len(batch) for batch in read_batches(path)] == [3, 3, 3, 1]
        assert column(path, "question") == [row["question"] for row in many]


def test_a_csv_file_of_several_blocks_keeps_every_row(written, monkeypatch):
    monkeypatch.setattr(table_files, "_CSV_BLOCK_BYTES", 100)
    text = "question\n" + "".join(f'"What\nof {i}?"\n' for i in range(50))
    path = written("q.csv", text)
    assert len(list(read_batches(path))) > 3
    assert column(path, "question") == [f"What\nof {i}?" for i in range(50)]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("q.csv", "query,video\nWhat?,a\n", r"q\.csv has no column question; it has query, video"),
        ("q.jsonl", '{"question": "a"}\n\n{"question": \n', r"line 3 of .*q\.jsonl is not JSON"),
        ("q.jsonl", '{"question": "a", "video": NaN}', "the video in row 1 of .* cannot be stored"),
        ("q.jsonl", "[" * 9999, r"line 1 of .*q\.jsonl is not JSON \(it is nested too deeply"),
        ("q.jsonl", "[1]", "row 1 of .* is not an object"),
        ("q.jsonl", '{"question": "a"}\n{"question": "b", "video": ["c"]}', "row 2 of .* has a video that is not a te"),
        ("q.jsonl", '{"question": "\\ud800"}', "the question in row 1 of .* cannot be stored"),
        ("q.jsonl", '{"question": "a", "choices": ["\\ud800"]}', "the choices in row 1 of .* cannot be stored"),
        ("q.jsonl", b'{"question": "caf\xe9"}', r"q\.jsonl is not UTF-8"),
        ("q.json", b'[{"question": "caf\xe9"}]', r"q\.json is not UTF-8"),
        ("q.json", '{"question": "a"}', "must hold a list of questions"),
        ("q.json", "[{", r"q\.json is not JSON"),
        ("q.csv", "question,video\na,b,c\n", r"q\.csv cannot be read as csv"),
        ("q.csv", b"question\ncaf\xe9\n", r"q\.csv is not UTF-8"),
        ("q.parquet", "text", r"q\.parquet cannot be read as parquet"),
        ("q.parquet", pa.table({"query": ["What?"]}), "has no column question; it has query"),
        ("q.parquet", pa.table({"question": ["a"], "video": [["b"]]}), "column video .* is of type list<.*as text"),
        ("q.parquet", pa.table({"question": ["a"], "schema": [{"b": 1}]}), "column schema .* is of type struct<"),
        ("q.parquet", pa.table({"question": [b"\xff"]}), "column question .* is of type binary"),
        ("q.txt", "What?", r"q\.txt must end in one of \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(written, name, content, sentence):
    path = written(name, content)
    with pytest.raises(InputError, match=sentence) as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"lost\.csv does not exist"):
        read_batches(str(tmp_path / "lost.csv"))
