import pytest

from jobs.asking import pairs
from pipeline.language.questions import Question
from schemas.errors import InputError

VIDEOS = [
    {"uri": "/data/a/cat.mp4", "external_id": "x1"},
    {"uri": "/data/b/dog.mp4", "external_id": None},
    {"uri": "s3://bucket/b/cow.mkv", "external_id": None},
    {"uri": "/data/b/cat.mov", "external_id": None},
]


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("/data/a/cat.mp4", "/data/a/cat.mp4"),
        ("x1", "/data/a/cat.mp4"),
        ("dog", "/data/b/dog.mp4"),
        ("cow.mkv", "s3://bucket/b/cow.mkv"),
        ("b/cow.mkv", "s3://bucket/b/cow.mkv"),
        ("cat.mov", "/data/b/cat.mov"),
    ],
)
def test_a_question_finds_its_video_by_any_clear_name(name, uri):
    ((_, video),) = pairs([Question("q", "What?", video=name)], VIDEOS)
    assert video["uri"] == uri


@pytest.mark.parametrize(("name", "says"), [("cat", "could mean 2 videos"), ("horse", "names no indexed video")])
def test_an_unclear_name_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        list(pairs([Question("q", "What?", video=name)], VIDEOS))


def test_a_question_without_a_video_is_about_all():
    assert len(list(pairs([Question("q", "What?"), Question("r", "Why?")], VIDEOS))) == 8
