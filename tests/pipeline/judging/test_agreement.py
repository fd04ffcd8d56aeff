import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longvlm.pipeline.answering.questions import read_questions
from longvlm.pipeline.judging.agreement import is_right, is_same_answer, read_right_answers
from longvlm.schemas.errors import InputError


def question(kind, choices=None, schema=None):
    return {"question": "?", "type": kind, "choices": choices, "schema": schema}


def rows_of(path):
    return dict(enumerate(read_questions(str(path)).to_pylist()))


@pytest.mark.parametrize(
    ("kind", "one", "other", "equal"),
    [
        ("text", "A dog.", "A dog.", True),
        ("text", "A dog.", "a dog", False),
        ("bool", "Yes", "Yes", True),
        ("bool", "Yes", "No", False),
        ("number", "7 dogs", "It is 7.0", True),
        ("number", "7", "8", False),
        ("number", "7", "a few", False),
        ("number", "a few", "a few", True),
        ("number", "a few", "some", False),
        ("json", '{"a": 1, "b": [2]}', 'Here: {"b": [2.0], "a": 1}', True),
        ("json", '{"a": 1}', '{"a": 2}', False),
    ],
)
def test_answers_are_the_same_if_their_values_are(kind, one, other, equal):
    assert is_same_answer(question(kind), one, other) is is_same_answer(question(kind), other, one) is equal


@pytest.mark.parametrize(
    ("kind", "answer", "right", "expected"),
    [
        ("text", " a  Dog ", "A dog.", True),
        ("text", "two dogs", "a dog", False),
        ("bool", "Yes", "yes", True),
        ("bool", "Yes", "true", True),
        ("bool", "No", "Yes", False),
        ("choice", "dark red", "Dark red.", True),
        ("choice", "blue", "dark red", False),
        ("number", "about 12", "12.0", True),
        ("number", "a dozen", "12", False),
        ("json", "[1, 2]", "[1,2]", True),
    ],
)
def test_an_answer_is_right_if_it_means_what_the_file_says(kind, answer, right, expected):
    asked = question(kind, ["dark red", "blue"] if kind == "choice" else None)
    assert is_right(asked, answer, right) is expected


ROWS = [
    {"question": "What?", "answer": "a dog"},
    {"question": "Red?", "type": "bool", "answer": True},
    {"question": "Why?"},
    {"question": "How many?", "type": "number", "answer": 3},
]
EXPECTED = {0: "a dog", 1: "true", 2: None, 3: "3"}


def test_right_answers_are_read_from_every_kind_of_file(tmp_path):
    lines = tmp_path / "q.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, ROWS)) + '\n{"question": "x", "answer": NaN}\n')
    listed = tmp_path / "q.json"
    listed.write_text(json.dumps([{("A" if k == "answer" else k): v for k, v in row.items()} for row in ROWS]))
    texts = [{**row, "answer": EXPECTED[i], "type": row.get("type")} for i, row in enumerate(ROWS)]
    csv = tmp_path / "q.csv"
    csv.write_text(
        "question,type,answer\n" + "\n".join(f"{r['question']},{r['type'] or ''},{r['answer'] or ''}" for r in texts)
    )
    parquet = tmp_path / "q.parquet"
    pq.write_table(pa.Table.from_pylist(texts), parquet)
    for path in (listed, csv, parquet):
        assert read_right_answers(str(path), rows_of(path)) == EXPECTED
    assert read_right_answers(str(lines), rows_of(lines)) == {**EXPECTED, 4: None}
    assert read_right_answers(str(csv), {3: rows_of(csv)[3]}) == {3: "3"}


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_file_without_right_answers_has_none(tmp_path, suffix):
    path = tmp_path / f"q.{suffix}"
    if suffix == "csv":
        path.write_text("question\nWhat?\n")
    elif suffix == "jsonl":
        path.write_text('{"question": "What?"}')
    else:
        pq.write_table(pa.table({"Q": ["What?"]}), path)
    assert read_right_answers(str(path), rows_of(path)) == {0: None}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"type": "number", "answer": "a few"}, "row 1 of the question file .* is of type number"),
        ({"type": "bool", "answer": "perhaps"}, "'perhaps', is not"),
        ({"type": "choice", "choices": "red|green", "answer": "blue"}, "is of type choice"),
    ],
)
def test_a_right_answer_that_is_not_of_its_type_is_refused(tmp_path, row, says):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "?", **row}))
    with pytest.raises(InputError, match=says):
        read_right_answers(str(path), rows_of(path))
