import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longvlm.pipeline import table_files
from longvlm.pipeline.answering.questions import ask, read_questions
from longvlm.schemas.errors import InputError
from longvlm.schemas.tables import QUESTIONS

ASKED = {"question_id": None, "question": "What?", "video": None, "type": "text", "choices": None, "schema": None}
SCHEMA = '{"type":"object","required":["n"],"properties":{"n":{"type":"integer"}}}'


@pytest.fixture
def written(tmp_path):
    def write(*rows, name="q.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"question": "What?"} | row) for row in rows))
        return str(path)

    return write


def test_a_question_alone_is_enough(written, tmp_path):
    assert ask("What?").to_pylist() == read_questions(written({})).to_pylist() == [ASKED]
    (tmp_path / "q.csv").write_text("question\nWhat?\n")
    assert read_questions(str(tmp_path / "q.csv")).to_pylist() == [ASKED]
    assert ask("What?").schema == read_questions(str(tmp_path / "q.csv")).schema == QUESTIONS


def test_one_question_of_each_type_can_be_asked():
    assert ask("Is it?", "bool")["type"].to_pylist() == ["bool"]
    assert ask("Which?", "choice", ["red, or", "green"])["choices"].to_pylist() == [["red, or", "green"]]
    with pytest.raises(InputError, match=r"^the question is of type 'colour', which is none of text, bool, choice"):
        ask("Which?", "colour")
    with pytest.raises(InputError, match=r"^the question has no text"):
        ask(" \n")
    with pytest.raises(InputError, match=r"^the question is of type choice and needs at least two choices"):
        ask("Which?", "choice", ["red", "red"])
    with pytest.raises(InputError, match=r"^the question is not UTF-8"):
        ask("caf\udce9?")


def test_a_question_keeps_its_white_space_and_line_breaks(written):
    text = "  Where is\n the ball?\u2028 "
    assert read_questions(written({"question": text}))["question"].to_pylist() == [text]


def test_rows_keep_their_order_and_repeat_as_in_the_file(written):
    rows = [{"question_id": i, "video": "b"} for i in "3113"]
    assert read_questions(written(*rows))["question_id"].to_pylist() == list("3113")


def test_empty_cells_are_null(written):
    row = dict.fromkeys(("question_id", "video", "type", "choices", "schema"), "")
    assert read_questions(written(row)).to_pylist() == [ASKED]
    assert read_questions(written({"choices": []})).to_pylist() == [ASKED]


@pytest.mark.parametrize("choices", [["red", "green"], '["red", "green"]', "red|green", " red | green "])
def test_choices_as_lists_and_in_spreadsheets(written, tmp_path, choices):
    row = {"question": "Which?", "type": "choice", "choices": choices}
    assert read_questions(written(row))["choices"].to_pylist() == [["red", "green"]]
    pq.write_table(pa.Table.from_pylist([row, row | {"type": None, "choices": None}]), tmp_path / "q.parquet")
    assert read_questions(str(tmp_path / "q.parquet"))["choices"].to_pylist() == [["red", "green"], None]


def test_choices_may_be_numbers_and_are_texts_then(written):
    rows = [{"type": "choice", "choices": choices} for choices in ([1, 2.5, True], "[1, 2.5, true]")]
    assert read_questions(written(*rows))["choices"].to_pylist() == [["1", "2.5", "true"]] * 2


def test_a_schema_is_the_same_text_however_it_is_laid_out(written):
    rows = [
        {"type": "json", "schema": json.loads(SCHEMA)},
        {"type": "json", "schema": json.dumps(json.loads(SCHEMA), indent=2)},
        {"type": "json", "json_schema": SCHEMA},
        {"type": "json"},
    ]
    assert read_questions(written(*rows))["schema"].to_pylist() == [SCHEMA, SCHEMA, SCHEMA, None]


CHOICE = {"type": "choice"}
JSON = {"type": "json"}
REMOTE = {"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": None}, "has no text in its column question"),
        ({"question": "\u3000 "}, "has no text in its column question"),
        ({"question": 3}, "has no text in its column question"),
        ({"type": "open"}, "is of type 'open', which is none of text, bool, choice, number, json"),
        ({"type": 3}, "is of type '3', which is none of"),
        (CHOICE, "is of type choice and needs at least two choices that differ"),
        (CHOICE | {"choices": []}, "is of type choice and needs at least two choices that differ"),
        (CHOICE | {"choices": ["red"]}, "is of type choice and needs at least two choices that differ"),
        (CHOICE | {"choices": ["red", "red"]}, "is of type choice and needs at least two choices that differ"),
        (CHOICE | {"choices": ["red", "green", " "]}, "is of type choice and needs .* none empty"),
        (
            CHOICE | {"choices": "red, green"},
            r"is of type .* empty; 'red, green' is one choice, for they are separated by \|",
        ),
        (CHOICE | {"choices": "red|"}, "is of type choice and needs .* none empty"),
        (CHOICE | {"choices": ["red", None]}, "has choices that cannot be used: a choice is a text or a number"),
        (CHOICE | {"choices": [["red"], "green"]}, "has choices that cannot be used: a choice is a text or a number"),
        (CHOICE | {"choices": '["red", '}, "has choices that cannot be used: Expecting value"),
        ({"choices": ["yes", "no"]}, "has choices, but is of type text; they go with the type choice"),
        ({"type": "bool", "choices": ["yes", "no"]}, "has choices, but is of type bool"),
        ({"schema": SCHEMA}, "has a schema, but is of type text; it goes with the type json"),
        (JSON | {"schema": "{"}, "has a schema that cannot be used: Expecting property name"),
        (JSON | {"schema": "[]"}, "has a schema that cannot be used: it is not a JSON object"),
        (JSON | {"schema": {"type": "colour"}}, "has a schema that cannot be used: 'colour' is not valid"),
        (JSON | {"schema": REMOTE}, "has a schema that cannot be used: its .* leads to no place in it"),
    ],
)
def test_the_first_row_that_cannot_be_asked_is_named(written, monkeypatch, row, sentence):
    monkeypatch.setattr(table_files, "BATCH_ROWS", 2)
    path = written({}, {}, {}, row, {"question": ""})
    with pytest.raises(InputError, match=rf"^row 4 of the question file .*q\.jsonl {sentence}") as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)


def test_lists_of_choices_in_parquet_are_held_to_the_same(tmp_path):
    rows = [["red", "green"], None, ["red", None]]
    table = pa.table({"question": ["What?"] * 3, "type": ["choice", "text", "choice"], "choices": rows})
    pq.write_table(table, tmp_path / "q.parquet")
    with pytest.raises(InputError, match=r"^row 3 of .* needs at least two choices that differ, none empty"):
        read_questions(str(tmp_path / "q.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.csv", "", "is empty"),
        ("q.csv", "question\n", "holds no questions"),
        ("q.jsonl", "\n", "is empty"),
        ("q.json", "", "is empty"),
        ("q.json", "[]", "holds no questions"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"the question file .*{name} {says}"):
        read_questions(str(tmp_path / name))


def test_a_million_rows_are_read_by_columns(tmp_path):
    rows = 1_000_000
    number = pa.array(range(rows))
    pq.write_table(
        pa.table({"question_id": number, "Q": number.cast(pa.string()), "n": number}), tmp_path / "q.parquet"
    )
    before = pa.total_allocated_bytes()
    read = read_questions(str(tmp_path / "q.parquet"))
    assert read.num_rows == rows
    assert read["question"][-1].as_py() == str(rows - 1)
    assert pa.total_allocated_bytes() - before < 1.5 * read.nbytes
