import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longvlm.pipeline.judging.benchmarks import BENCHMARKS, labels_benchmark, read_items
from longvlm.schemas.errors import InputError

QA, GENERIC, PAIRED = (
    BENCHMARKS[name] for name in ("activitynet-qa", "videochatgpt-detail", "videochatgpt-consistency")
)


@pytest.fixture
def write(tmp_path):
    def write(rows, name="q.json"):
        path = tmp_path / name
        lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
        path.write_text(lines)
        return str(path)

    return write


def picked(items, *names):
    return [tuple(row[name] for name in names) for row in items.to_pylist()]


def test_questions_and_answers_in_two_files_meet_by_id(write):
    asked = [{"video_name": f"v{i}", "question": f"what {i}", "question_id": f"v{i}.{i}"} for i in range(3)]
    given = [{"answer": f"a{i}", "type": i, "question_id": f"v{i}.{i}"} for i in (2, 0, 1)]
    items = read_items(QA, write(asked), write(given, "a.json"))
    names = ("question_id", "question", "video", "answer", "kind", "type")
    assert picked(items, *names) == [(f"v{i}.{i}", f"what {i}", f"v{i}", f"a{i}", str(i), "text") for i in range(3)]


def test_the_layout_of_msrvtt_and_msvd_has_numbers_for_ids_and_videos(write):
    rows = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what?", "video_id": 6513}]
    items = read_items(BENCHMARKS["msrvtt-qa"], write(rows))
    assert picked(items, "question_id", "video", "answer", "kind") == [("158581", "6513", "couch", None)]


def test_both_layouts_of_videochatgpt(write):
    rows = [{"Q": "what?", "A": "a dog", "video_name": "v"}, {"question": "q", "answer": "a", "video_id": "w"}]
    names = ("question_id", "question", "answer", "video")
    assert picked(read_items(GENERIC, write(rows)), *names) == [(None, "what?", "a dog", "v"), (None, "q", "a", "w")]
    pair = [{"Q1": "what?", "Q2": "which?", "A": "a dog", "video_name": "v", "question_id": 7}]
    assert picked(read_items(PAIRED, write(pair)), "question", "question2", "question_id") == [("what?", "which?", "7")]


def test_labels_are_typed_and_come_in_every_format(write, tmp_path):
    rows = [
        {"video": "a", "question": "red?", "answer": "yes", "type": "bool", "kind": "colour"},
        {"video": "b", "question": "how many?", "answer": "7", "type": "number", "kind": None},
    ]
    expected = [("a", "yes", "bool", "colour"), ("b", "7", "number", None)]
    csv = tmp_path / "l.csv"
    csv.write_text("video,question,answer,type,kind\na,red?,yes,bool,colour\nb,how many?,7,number,\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    for path in (write(rows), write(rows, "l.jsonl"), csv, tmp_path / "l.parquet"):
        items = read_items(labels_benchmark(str(path)), str(path))
        assert picked(items, "video", "answer", "type", "kind") == expected
    assert labels_benchmark(str(csv)).name == "labels:l"


@pytest.mark.parametrize(
    ("benchmark", "row", "says"),
    [
        (
            QA,
            {"question": "q", "answer": "a"},
            r"row 2 of the question file .*q\.json has no video \(in a column video ",
        ),
        (QA, {"question": "q", "video_name": "v"}, r"row 2 .* has no answer \(in a column answer or A\)"),
        (QA, {"answer": "a", "video_name": "v"}, "row 2 .* has no text in its column question"),
        (QA, {"question": "q", "answer": "", "video_name": "v"}, "row 2 .* has no answer"),
        (PAIRED, {"question": "q", "answer": "a", "video_name": "v"}, r"row 2 .* has no question2 \(in a column quest"),
        (QA, "a text", "row 2 .* is not an object"),
    ],
)
def test_a_missing_field_is_told_with_file_row_and_field(write, benchmark, row, says):
    good = {"question": "q", "question2": "q", "answer": "a", "video_name": "v"}
    with pytest.raises(InputError, match=says):
        read_items(benchmark, write([good, row]))


@pytest.mark.parametrize(
    ("question", "answers", "says"),
    [
        ({}, [{"question_id": 1, "answer": "a"}], r"row 1 of the question file .*q\.json has no question_id"),
        ({"question_id": 2}, [{"question_id": 1, "answer": "a"}], r"has the question_id '2', which the answer file"),
        ({"question_id": 1}, [{"question_id": 1}], r"row 1 of the answer file .*a\.json has no answer"),
        ({"question_id": 1}, [{"question_id": 1, "answer": "a"}] * 2, "row 2 .* answers the question '1' once more"),
        ({"question_id": 1}, [], "has the question_id '1', which the answer file .* has not"),
    ],
)
def test_files_that_do_not_belong_together_are_told(write, question, answers, says):
    with pytest.raises(InputError, match=says):
        read_items(QA, write([{"question": "q", "video": "v", **question}]), write(answers, "a.json"))


def test_an_empty_file_and_an_answer_of_another_type_are_told(write):
    with pytest.raises(InputError, match="holds no questions"):
        read_items(QA, write([]))
    wrong = write([{"question": "q", "video": "v", "answer": "perhaps", "type": "bool"}], "l.jsonl")
    with pytest.raises(
        InputError, match=r"row 1 of the label file .* is of type bool, but its answer, 'perhaps', is not"
    ):
        read_items(labels_benchmark(wrong), wrong)
