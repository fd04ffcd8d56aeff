import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import longvlm
from longvlm.handle import VideoIndex
from longvlm.schemas import tables
from longvlm.schemas.errors import InputError


@pytest.fixture(scope="module")
def index(indexed) -> VideoIndex:
    return longvlm.open(indexed)


@pytest.fixture
def copied(indexed, tmp_path) -> VideoIndex:
    """A store that may be written to."""
    shutil.copytree(indexed, tmp_path / "store")
    return longvlm.open(str(tmp_path / "store"))


def test_importing_it_loads_nothing_heavy_and_opening_a_store_neither_torch_nor_ray(indexed):
    code = f"""
import sys, longvlm
print(*sys.modules)
print(len(longvlm.open({indexed!r}).videos()))
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, number, opened = done.stdout.splitlines()
    heavy = {"torch", "ray", "transformers", "duckdb", "deltalake", "pyarrow", "numpy", "pandas", "click"}
    assert not heavy & {name.partition(".")[0] for name in imported.split()}
    assert number == "12"
    assert not {"torch", "ray", "transformers"} & {*opened.split()}


def test_a_store_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no store"):
        longvlm.open(str(tmp_path))


def test_tables_come_as_arrow_and_may_be_narrowed(index):
    assert len(index.videos()) == 12
    (long,) = index.videos("uri LIKE '%clip-03.mp4' -- the fourth").to_pylist()
    assert long["duration_s"] == 4.0
    assert set(index.segments(f"uri = '{long['uri']}'")["start_s"].to_pylist()) == {0.0, 2.0}
    assert len(index.answers()) == 0
    with pytest.raises(InputError, match="colour"):
        index.videos("colour = 'red'")


def test_queries_read_the_store_and_what_is_attached_and_nothing_else(index, tmp_path):
    sites = tmp_path / "sites.csv"
    pd.DataFrame({"uri": index.videos()["uri"].to_pylist(), "site": ["north", "south"] * 6}).to_csv(sites, index=False)
    query = "SELECT site, count(*) AS n FROM videos JOIN sites USING (uri) GROUP BY site ORDER BY site"
    assert index.sql(query, [f"sites={sites}"]).to_pylist() == [{"site": "north", "n": 6}, {"site": "south", "n": 6}]
    with pytest.raises(InputError, match="cannot run"):
        index.sql(f"FROM read_csv('{sites}')")
    with pytest.raises(InputError, match="SELECT"):
        index.sql("DROP VIEW videos")


@pytest.mark.parametrize("name", ["clip-03", "clip-03.mp4", "uri"])
def test_the_tokens_of_a_video_are_those_that_are_stored(index, clips, name):
    tokens = index.tokens(str(clips / "clip-03.mp4") if name == "uri" else name)
    assert tokens.uri == str(clips / "clip-03.mp4")
    assert (tokens.local.dtype, tokens.local.shape) == (np.float16, (16, 64))
    stored = index.sql(f"SELECT local, sizes, spans FROM tokens WHERE write_id = '{tokens.write_id}' ORDER BY segment")
    for column, dtype in (("local", "<f2"), ("sizes", "<u2"), ("spans", "<u4")):
        blobs = b"".join(stored[column].to_pylist())
        np.testing.assert_array_equal(getattr(tokens, column).ravel(), np.frombuffer(blobs, dtype))
    assert tokens.segments["segment"].to_pylist() == [0, 1]
    assert tokens.segment_of.tolist() == [0] * 8 + [1] * 8
    assert tokens.global_tokens.shape[1] == 64
    assert tokens.torch.local.data_ptr() == tokens.local.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        tokens.local[0, 0] = 1


def test_a_video_that_nobody_knows_or_that_could_be_several_is_a_sentence(index):
    with pytest.raises(InputError, match="no live video is called 'nobody'"):
        index.tokens("nobody")


def test_a_search_gives_moments_best_first(index):
    found = index.search("a red square", limit=3, where="duration_s > 1.5")
    assert len(found) == 3
    assert found["score"].to_pylist() == sorted(found["score"].to_pylist(), reverse=True)
    assert {*found.column_names} >= {"uri", "segment", "start_s", "end_s", "best_s"}
    verified = index.search("a red square", limit=3, verify="Is it red?")
    assert verified["uri"].to_pylist() == index.search("a red square", limit=3)["uri"].to_pylist()
    assert all(0 < yes < 1 for yes in verified["yes"].to_pylist())


def test_questions_are_answered_once_one_or_many(copied):
    asked = {"precision": "float32", "max_new_tokens": 4}
    answers = copied.ask("Is it red?", kind="bool", limit=2, **asked)
    assert answers.schema == tables.ANSWERS
    assert {*answers["value"].to_pylist()} <= {"true", "false"}
    table = pd.DataFrame({"question": ["Is it red?", "What is it?"], "video": ["clip-01", "clip-02"], "right": [1, 2]})
    both = copied.ask(table.assign(type=["bool", "text"]), **asked)
    told = {row["question"]: row for row in both.to_pylist()}
    assert {*told} == {"Is it red?", "What is it?"}
    again = copied.ask(pa.table({"question": ["What is it?"], "video": ["clip-02"]}), **asked)
    assert again["run_id"].to_pylist() == [told["What is it?"]["run_id"]]
    assert len(copied.answers()) in (3, 4)  # clip-01 may have been one of the first two
    with pytest.raises(InputError, match="question"):
        copied.ask(pa.table({"text": ["What?"]}))


def test_an_index_is_made_and_grows(tmp_path, clips, model):
    told = longvlm.index(str(clips), str(tmp_path / "store"), model=model, recipe="tiny", limit=2)
    assert (told["indexed"], told["not_attempted"], told["stopped"]) == (2, 10, None)
    again = longvlm.index(str(clips), str(tmp_path / "store"), include=("clip-0[0-3]*",))
    assert (again["indexed"], again["unchanged"]) == (2, 2)
    assert len(longvlm.open(str(tmp_path / "store")).videos()) == 4


def test_face_and_command_line_do_not_know_each_other():
    from support import ROOT

    for path in (ROOT / "longvlm").glob("*.py"):
        text = path.read_text()
        assert ".command" not in text
        assert "jobs.cli" not in text or path.name == "__main__.py"
    for path in (ROOT / "jobs").rglob("*.py"):
        assert "longvlm.handle" not in path.read_text()
