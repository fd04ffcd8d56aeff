import numpy as np
import pyarrow as pa
import pytest
import torch
from stores import segment_of, token_video

from longvlm.jobs.answer.view import Viewer
from longvlm.jobs.stored_videos import StoredVideo
from longvlm.pipeline.answering.about import search_vectors
from longvlm.pipeline.vision.budget import Budget, fit
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, PipelineError

BUDGET = Budget(40, focus="question")  # of ten segments with 16 tokens each


class Words:
    """A text encoder to which a text is the tenths of a circle that its number says."""

    def __init__(self):
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        angles = torch.tensor([int(text.split()[-1]) * torch.pi / 20 for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


def stored(*, with_vectors=True):
    """Ten segments of ten seconds, each looking like the number it has."""
    times = [{"start_s": 10.0 * i, "end_s": 10.0 * i + 10} for i in range(10)]
    angles = [i * np.pi / 20 for i in range(10)]
    rows = [{"frames": None, "frame_embeddings": None, "embedding": [np.cos(a), np.sin(a)]} for a in angles]
    names = ("frames", "frame_embeddings", "embedding")
    vectors = search_vectors(pa.Table.from_pylist(rows, pa.schema([tables.SEGMENTS.field(name) for name in names])))
    return StoredVideo(token_video((16,) * 10), times, vectors if with_vectors else None)


def test_questions_that_keep_the_same_segments_share_a_view():
    words = Words()
    viewer = Viewer("question", words)
    asked = ["Is there a 3", "Is it at 1:15?", "A 3", "And 7", "Where is the 3"]
    views = list(viewer.views(stored(), BUDGET, asked))
    assert sorted(place for _, places in views for place in places) == [0, 1, 2, 3, 4]
    by_place = {place: view for view, places in views for place in places}
    assert by_place[0] is by_place[2] is by_place[4]
    assert by_place[1] is not by_place[0]
    assert [by_place[place].kept for place in (0, 1, 3)] == [(3,), (7,), (7,)]
    assert {view.focus for view, _ in views} == {"question"}
    assert all(len(view.tokens.local) == 40 for view, _ in views)
    list(viewer.views(stored(), BUDGET, asked))
    assert len(words.seen) == len(set(words.seen))  # no text is encoded twice, and one that names a time never
    assert not any("1:15" in text or "1 15" in text for text in words.seen)


def test_auto_decides_question_by_question_and_says_what():
    (moment, some), (whole, others) = Viewer("auto", Words()).views(
        stored(), BUDGET, ["Is there a 3", "How many things like 3", "Describe 7"]
    )
    assert (some, others) == ([0], [1, 2])
    assert (moment.focus, moment.kept) == ("question", (3,))
    assert (whole.focus, whole.kept) == ("even", None)
    assert torch.equal(whole.tokens.local, fit(stored().tokens, BUDGET).local)


@pytest.mark.parametrize("focus", ["question", "auto", "even", None])
def test_nothing_gives_way_where_there_is_no_need(focus):
    words, video = Words(), stored()
    ((view, places),) = Viewer(focus, words).views(video, Budget(160, focus=focus), ["Is it 3", "Or 7"])
    assert view.tokens is video.tokens
    assert (view.focus, view.kept, places, words.seen) == (None, None, [0, 1], [])


@pytest.mark.parametrize("texts", [None, Words()])
def test_without_search_vectors_auto_follows_only_times(texts):
    views = list(Viewer("auto", texts).views(stored(with_vectors=False), BUDGET, ["Is there a 3", "What is at 1:15?"]))
    assert {view.focus: places for view, places in views} == {"even": [0], "question": [1]}


def test_focus_question_fails_questions_whose_segments_nothing_is_known_of():
    asked = ["Is there a 3", "What is at 1:15?"]
    (error, failed), (view, places) = Viewer("question", Words()).views(stored(with_vectors=False), BUDGET, asked)
    assert isinstance(error, PipelineError)
    assert (error.code, failed) == (ErrorCode.BAD_TOKENS, [0])
    assert "--focus even" in error.message
    assert (view.kept, places) == ((7,), [1])


def test_a_budget_that_is_too_small_fails_all_its_questions():
    ((error, places),) = Viewer(None, None).views(stored(), Budget(5), ["What?", "Who?"])
    assert (error.code, places) == (ErrorCode.BUDGET_TOO_SMALL, [0, 1])


def test_what_is_kept_is_as_stored():
    video = stored()
    ((view, _),) = Viewer("question", Words()).views(video, BUDGET, ["Is there a 3"])
    place = view.tokens.counts.index(16)
    assert torch.equal(segment_of(view.tokens, place)[0], segment_of(video.tokens, 3)[0].float())
