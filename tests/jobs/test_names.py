import duckdb
import pyarrow as pa
import pytest

from longvlm.jobs.names import known_names, match_live
from longvlm.schemas.errors import InputError

LIVE = [
    ("/data/a/cat.mp4", "x1"),
    ("/data/b/dog.mp4", None),
    ("s3://bucket/b/cow.mkv", None),
    ("/data/b/cat.mov", None),
    ("/data/2/video.mp4", "7"),
    ("/data/1/video.mp4", "cow.mkv.old"),
    ("/data/c/7.mp4", None),
    ("/data/d/dog.mp4.mp4", None),
]
GONE = [("/data/x/horse.mp4", "h"), ("/data/y/horse.mp4", None)]


def resolved(*names):
    """Which uri each name leads to, and how many questions are about videos that are not live."""
    con = database()
    con.register("given", pa.table({"q": range(len(names)), "question": ["What?"] * len(names), "video": names}))
    named, num_not_indexed = match_live(con, "given", "live", "ledger_videos")
    con.register("named", named)
    return dict(con.execute("SELECT name, uri FROM named JOIN live USING (n)").fetchall()), num_not_indexed


def database():
    con = duckdb.connect()
    for table, rows in {"live": LIVE, "ledger_videos": LIVE + GONE}.items():
        con.execute(f"CREATE TABLE {table} (n INTEGER, uri VARCHAR, external_id VARCHAR)")
        con.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", [(n, *row) for n, row in enumerate(rows)])
    return con


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("/data/a/cat.mp4", "/data/a/cat.mp4"),
        ("x1", "/data/a/cat.mp4"),
        ("dog", "/data/b/dog.mp4"),
        ("cow.mkv", "s3://bucket/b/cow.mkv"),
        ("b/cow.mkv", "s3://bucket/b/cow.mkv"),
        ("/bucket/b/cow.mkv", "s3://bucket/b/cow.mkv"),
        ("cat.mov", "/data/b/cat.mov"),
        ("2/video.mp4", "/data/2/video.mp4"),
    ],
)
def test_a_question_finds_its_video_by_any_clear_name(name, uri):
    assert resolved(name) == ({name: uri}, 0)


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("7", "/data/2/video.mp4"),  # an external_id before a stem
        ("dog.mp4", "/data/b/dog.mp4"),  # a file name before a stem
    ],
)
def test_where_two_ways_lead_to_two_videos_the_first_way_counts(name, uri):
    assert resolved(name) == ({name: uri}, 0)


def test_many_names_of_several_kinds_are_found_at_once():
    found, _ = resolved("x1", "1/video.mp4", "data/b/dog.mp4", "cow", None)
    assert found == {
        "x1": "/data/a/cat.mp4",
        "1/video.mp4": "/data/1/video.mp4",
        "data/b/dog.mp4": "/data/b/dog.mp4",
        "cow": "s3://bucket/b/cow.mkv",
    }


@pytest.mark.parametrize("name", ["cat", "video.mp4"])
def test_a_name_of_several_videos_is_refused(name):
    with pytest.raises(InputError, match="could mean 2 videos"):
        resolved("dog", name)


@pytest.mark.parametrize("name", ["zebra", "at.mp4", "a/dog.mp4", "", "%", "c_w"])
def test_a_name_that_nobody_knows_is_refused_with_a_count_and_an_example(name):
    with pytest.raises(InputError, match=r"2 of the questions name no indexed video: the first, 'What\?', is about"):
        resolved("dog", name, name)


def test_questions_about_videos_that_are_not_live_are_counted():
    assert resolved("dog", "h", "horse", "y/horse.mp4", "horse") == ({"dog": "/data/b/dog.mp4"}, 4)


def test_known_names_are_those_of_every_video_there_ever_was():
    con = database()
    assert known_names(con, ["dog", "a/cat.mp4", "h", "horse", "nobody", "x", "dog"], "ledger_videos") == {
        "dog",
        "a/cat.mp4",
        "h",
        "horse",
    }
