import json

from longvlm.pipeline.answering.questions import read_questions
from longvlm.tinyworld.world import make_world, question_rows, write_rows


def test_videos_and_their_questions_lie_in_one_folder(tmp_path):
    path = make_world(tmp_path / "world", seed=9, num_videos=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["video"] for row in rows} == {file.stem for file in path.parent.glob("*.mp4")}
    assert len({row["question_id"] for row in rows}) == len(rows) > 30
    assert {key for row in rows for key in row} == {"video", "question_id", "question", "answer", "kind", "type"}


def test_the_same_seed_writes_the_same_questions_and_more_videos_change_nothing(tmp_path):
    few, more = (make_world(tmp_path / str(n), seed=9, num_videos=n).read_text() for n in (2, 3))
    assert more.startswith(few)


def test_typed_questions_are_rows_that_a_question_file_may_have(tmp_path):
    rows = [row for answer in ("bool", "choice", "number") for row in question_rows(9, 2, answer)]
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert not {row["question_id"] for row in rows} & {row["question_id"] for row in question_rows(9, 2)}
    write_rows(tmp_path / "q.jsonl", rows)
    read = read_questions(str(tmp_path / "q.jsonl")).to_pylist()
    assert [(row["type"], row["choices"]) for row in read] == [(row["type"], row.get("choices")) for row in rows]
