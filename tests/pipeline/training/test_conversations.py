import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from longvlm.pipeline.training.conversations import check_conversations, read_conversations, to_reference
from longvlm.schemas.errors import InputError
from longvlm.schemas.training import CONVERSATIONS

ROWS = [
    {"video_id": "v1", "q": "What is it?", "a": "a ball"},
    {"video_id": "v2", "q": "Where,\nand why?", "a": 'at "home"'},
]


def talk(*turns, **fields):
    roles = ("human", "gpt")
    said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "t1", "video": "v1", "conversations": said, **fields}


def turns(table):
    return [[(turn["question"], turn["answer"]) for turn in row] for row in table["turns"].to_pylist()]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_instruction_rows_of_every_kind_of_file(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text(json.dumps(ROWS) if kind == "json" else "\n".join(map(json.dumps, ROWS)))
    found = read_conversations(str(path))
    assert found.schema == CONVERSATIONS
    assert found["video"].to_pylist() == ["v1", "v2"]
    assert turns(found) == [[("What is it?", "a ball")], [("Where,\nand why?", 'at "home"')]]


def test_the_reference_s_format_reads_as_the_rows_it_was_made_of(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(to_reference(ROWS)))
    found = read_conversations(str(path))
    assert turns(found) == turns(check_conversations(ROWS))
    assert found["id"].to_pylist() == ["v1", "v2"]


def test_turns_go_on_and_a_leading_answer_is_dropped():
    many = talk("<video>\nWhat?", "a ball", "And then?", "it falls")
    assert turns(check_conversations([many])) == [[("What?", "a ball"), ("And then?", "it falls")]]
    greeted = talk("What?\n<video>", "a ball")
    greeted["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    assert turns(check_conversations([greeted])) == [[("What?", "a ball")]]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("text", "row 1 of the conversations is not an object"),
        ({"q": "What?", "a": "it"}, "row 1 of the conversations has no text in video_id or video"),
        ({"video_id": "v", "q": "What?"}, "has no text in a or answer"),
        ({"video_id": "v", "q": "What?", "a": " "}, "has no text in a or answer"),
        (talk("What?", "it", "Why?"), r"\(t1\): human and gpt must alternate .* there speak: human, gpt, human"),
        (talk(), "there speak: nobody"),
        (talk("What?", "it", video=None, id=None), "has no text in video or id"),
        (talk("What?", 3), "turn 2 of row 1 of the conversations .* has no text in value"),
        (talk("What?", "it", "Why <video>?", "so"), "after its first question"),
        ({"id": "t", "conversations": "What?"}, "must be a list of turns"),
        (
            {
                "id": "t",
                "video": "v",
                "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}],
            },
            "there speak: human, human",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_told(row, said):
    with pytest.raises(InputError, match=said):
        check_conversations([row])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.txt", "", r"rows\.txt must end in one of \.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.parquet"),
        ("rows.json", "{", r"the conversation file .*rows\.json is not JSON"),
        ("rows.json", "{}", "must hold a list"),
        ("rows.json", "[]", "holds no conversations"),
        (
            "rows.json",
            '[{"q": "What?"}]',
            r"row 1 of the conversation file .*rows\.json has no text in video_id or video",
        ),
        ("rows.json", '[{"id": 1e999}]', "row 1 of .* has a text or number that cannot be stored"),
        ("rows.jsonl", '{"q"', r"line 1 of the conversation file .*rows\.jsonl is not JSON"),
        ("rows.jsonl", "", "is empty"),
        ("rows.parquet", "none", "cannot be read as parquet"),
    ],
)
def test_files_that_cannot_be_used_are_told(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        read_conversations(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_conversations(str(tmp_path / "rows.json"))


def test_answers_that_other_readers_take_for_gaps_are_answers(tmp_path):
    (tmp_path / "rows.csv").write_text("video_id,q,a\nv1,Which?,NA\nv1,And?,null\n")
    assert turns(read_conversations(str(tmp_path / "rows.csv"))) == [[("Which?", "NA")], [("And?", "null")]]


def test_gaps_of_a_program_that_writes_nan_are_gaps(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"video_id": 17.0, "q": "What?", "a": "it", "caption": NaN, "start_s": NaN}')
    (row,) = read_conversations(str(tmp_path / "rows.jsonl")).to_pylist()
    assert (row["video"], row["at_s"]) == ("17", None)
