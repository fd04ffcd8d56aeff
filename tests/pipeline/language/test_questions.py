import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.language.questions import Question, ask, question_hash, read_questions
from schemas.errors import InputError

ROWS = [
    {"question_id": "7", "question": "What, exactly?", "video": "a/b.mp4", "type": "open"},
    {"question_id": None, "question": "Où est le café ☕?", "video": None, "type": None},
]
WANTED = [
    Question("7", "What, exactly?", "a/b.mp4", "open"),
    Question(question_hash("Où est le café ☕?"), "Où est le café ☕?"),
]


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_the_same_questions_from_every_format(written, tmp_path):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert read_questions(written("q.jsonl", lines + "\n\n")) == WANTED
    assert read_questions(written("q.json", json.dumps(ROWS))) == WANTED
    table = 'question_id,question,video,type\n7,"What, exactly?",a/b.mp4,open\n,Où est le café ☕?,,\n'
    assert read_questions(written("q.csv", table)) == WANTED
    assert read_questions(written("bom.csv", b"\xef\xbb\xbf" + table.encode())) == WANTED
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    assert read_questions(str(tmp_path / "q.parquet")) == WANTED


def test_a_question_alone_is_enough(written):
    (question,) = read_questions(written("q.csv", "question\nWhat?\n"))
    assert question == ask("What?")
    assert question.question_id == question.hash == question_hash("What?")
    assert len(question.hash) == 16


def test_ids_stay_text(written, tmp_path):
    assert read_questions(written("q.csv", "question_id,question\n007,What?\n"))[0].question_id == "007"
    pq.write_table(pa.table({"question_id": [7], "question": ["What?"]}), tmp_path / "q.parquet")
    assert read_questions(str(tmp_path / "q.parquet"))[0].question_id == "7"
    assert read_questions(written("q.jsonl", '{"question_id": 0, "question": "What?"}'))[0].question_id == "0"


def test_videochatgpt_s_two_layouts(written):
    generic = [{"Q": "What?", "A": "A dog.", "video_name": "v_1"}, {"Q": "Why?", "A": "So.", "video_name": "v_1"}]
    assert [(q.question, q.video) for q in read_questions(written("generic.json", json.dumps(generic)))] == [
        ("What?", "v_1"),
        ("Why?", "v_1"),
    ]
    rows = [{"video_id": "v_1", "question_id": "v_1_0", "question": "What?", "answer": "A dog."}]
    assert read_questions(written("qa.json", json.dumps(rows))) == [Question("v_1_0", "What?", "v_1")]


@pytest.mark.parity
def test_the_reference_s_ground_truth_rows(goldens, written):
    files = list(goldens.glob("inference_qa_golden.json"))
    assert files
    rows = json.loads(files[0].read_text())["gt"]
    read = read_questions(written("gt.json", json.dumps(rows)))
    assert [(q.video, q.question_id, q.question) for q in read] == [
        (row["video_id"], row["question_id"], row["question"]) for row in rows
    ]


def test_questions_keep_their_white_space_and_line_breaks(written):
    text = "  Where is\n the ball? "
    assert read_questions(written("q.jsonl", json.dumps({"question": text})))[0].question == text
    assert read_questions(written("q.csv", f'question\n"{text}"\n'))[0].question == text


def test_a_repeated_row_is_one_question(written):
    assert len(read_questions(written("q.jsonl", '{"question": "What?"}\n' * 3))) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("q.csv", "query,video\nWhat?,a\n", r"q\.csv has no column question; it has query, video"),
        ("q.jsonl", '{"question": "a"}\n{"query": "b"}\n', r"row 2 of .*q\.jsonl has no text in its column question"),
        ("q.jsonl", '{"question": "  "}', "row 1 of .* has no text in its column question"),
        ("q.jsonl", '{"question": 3}', "row 1 of .* has no text in its column question"),
        ("q.jsonl", '{"question": "a"}\n\n{"question": \n', r"line 3 of .*q\.jsonl is not JSON"),
        ("q.jsonl", "[1]", "row 1 of .* is not an object"),
        ("q.json", '{"question": "a"}', "must hold a list of questions"),
        ("q.json", "[{", r"q\.json is not JSON"),
        ("q.csv", "", r"q\.csv holds no questions"),
        ("q.csv", "question\n", r"q\.csv holds no questions"),
        ("q.csv", "question,video\na,b,c\n", r"q\.csv cannot be read as csv"),
        ("q.csv", b"question\ncaf\xe9\n", r"q\.csv is not UTF-8"),
        ("q.jsonl", "\n", r"q\.jsonl holds no questions"),
        ("q.json", "", r"q\.json holds no questions"),
        ("q.parquet", "text", r"q\.parquet cannot be read as parquet"),
        ("q.txt", "What?", r"q\.txt must end in one of \.jsonl, \.json, \.csv, \.parquet"),
        ("q.csv", "question_id,question\n1,What?\n1,Why?\n", "the question_id 1 to two different questions"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(written, name, content, sentence):
    with pytest.raises(InputError, match=sentence):
        read_questions(written(name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"lost\.csv does not exist"):
        read_questions(str(tmp_path / "lost.csv"))


def test_a_parquet_file_without_the_column(tmp_path):
    pq.write_table(pa.table({"query": ["What?"]}), tmp_path / "q.parquet")
    with pytest.raises(InputError, match="has no column question; it has query"):
        read_questions(str(tmp_path / "q.parquet"))


def test_one_id_may_ask_the_same_of_many_videos(written):
    rows = [{"question_id": "1", "question": q, "video": v} for q, v in (("What?", "a"), ("Why?", "b"))]
    assert len(read_questions(written("q.json", json.dumps(rows)))) == 2
