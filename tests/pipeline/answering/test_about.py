import numpy as np
import pyarrow as pa
import pytest
import torch

from longvlm.pipeline.answering.about import (
    around,
    asked_about,
    is_of_a_moment,
    near_text,
    near_times,
    search_vectors,
    times_named,
)
from longvlm.schemas import tables

FIVE = [{"start_s": 2.0 * i, "end_s": 2.0 * i + 2} for i in range(5)]


@pytest.mark.parametrize(
    ("question", "times_s"),
    [
        ("what is seen at 0:04?", [4.0]),
        ("Who speaks at 1:23?", [83.0]),
        ("at 1:02:03?", [3723.0]),
        ("What changes from 0:10 to 0:20?", [10.0, 20.0]),
        ("Who is there at 90 seconds?", [90.0]),
        ("What is shown at 1.5 minutes?", [90.0]),
        ("at 3 s", [3.0]),
        ("What happens at the end?", [4000.0]),
        ("What is at the very beginning of the video?", [0.0]),
        ("what appears first?", [0.0]),
        ("what appears last?", [4000.0]),
        ("Who crosses the line first?", []),
        ("What happens at the end of the race?", []),
        ("Did it ring at 9:15 pm?", []),
        ("Is it 9:15 a.m.?", []),
        ("A ratio of 16:9?", []),
        ("at 5:00:00?", []),  # later than the video ends
        ("Does anybody fall?", []),
    ],
)
def test_times_that_a_question_names(question, times_s):
    assert times_named(question, 4000.0) == times_s


def test_segments_are_near_a_time_by_their_distance_and_a_time_between_two_is_the_later_ones():
    assert near_times([5.0], FIVE).tolist() == pytest.approx([-3, -1, 0, -1, -3])
    assert int(near_times([4.0], FIVE).argmax()) == 2
    assert near_times([0.0, 9.0], FIVE).tolist() == pytest.approx([0, -2, -3, -1, 0])
    assert int(near_times([10.0], FIVE).argmax()) == 4


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ("how does the red circle move?", "the red circle move"),
        ("What comes after the man's speech?", "the man's speech"),
        ("Is there a dog?", "a dog"),
        ("what happens in the video?", "what happens in the video?"),  # nothing else is said
        ("Wer ist das?", "Wer ist das"),
    ],
)
def test_words_that_only_ask_are_left_out(question, left):
    assert asked_about(question) == left


def rows(*segments):
    """Rows of the table `segments` with the vectors of their frames, or with one alone."""
    made = []
    for vectors, embedding in segments:
        of_frames = None if vectors is None else np.array(vectors, np.int8).tobytes()
        frames = None if vectors is None else list(range(len(vectors)))
        made.append({"frames": frames, "frame_embeddings": of_frames, "embedding": embedding})
    names = ("frames", "frame_embeddings", "embedding")
    return pa.Table.from_pylist(made, pa.schema([tables.SEGMENTS.field(name) for name in names]))


def test_a_segment_is_as_near_as_its_nearest_frame_or_where_frames_have_no_vectors_as_itself():
    vectors = search_vectors(rows(([[127, 0], [0, 127]], [0.7, 0.7]), ([[127, 127]], [0.7, 0.7]), (None, [0.6, 0.8])))
    assert vectors.counts == (2, 1, 1)
    near = near_text(vectors, torch.tensor([0.0, 1.0]))
    assert near.tolist() == pytest.approx([1, 0.5**0.5, 0.8])


def test_without_any_vector_of_a_segment_nothing_is_near():
    assert search_vectors(rows(([[127, 0]], [1.0, 0.0]), (None, None))) is None


def test_neighbours_of_the_nearest_are_nearer_than_others():
    nearness = around("How does the dog jump?", torch.tensor([0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.2]))
    assert nearness.tolist() == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.3, 0.125, 0.175])


@pytest.mark.parametrize(
    ("question", "nearest"),
    [
        ("What comes after the goal?", [5, 4]),
        ("Who is the next to score a goal?", [3, 4]),  # next to
        ("What follows the goal?", [5, 4]),
        ("What was there before the goal?", [1, 2]),
        ("What precedes the goal?", [1, 2]),
    ],
)
def test_what_comes_after_or_before_something_is_seen_at_its_edge(question, nearest):
    goal = torch.tensor([0.1, 0.12, 0.8, 0.9, 0.85, 0.15, 0.1, 0.1])
    found = around(question, goal).argsort(descending=True).tolist()[:2]
    assert found == nearest


PEAKED, WIDE = torch.tensor([0.1] * 9 + [0.9]), torch.tensor([0.9] * 9 + [0.1])


@pytest.mark.parametrize(
    "question",
    [
        "how many objects appear?",
        "Describe what the man does.",
        "Summarise it.",
        "what happens in the video?",
        "Who comes first in the race?",
        "In which order do they leave?",
        "What is it about?",
        "What is the overall mood?",
    ],
)
def test_words_that_ask_for_the_whole(question):
    assert not is_of_a_moment(question, PEAKED)


def test_what_is_seen_most_of_the_time_is_no_moment_but_its_edge_is():
    assert is_of_a_moment("Is there a dog?", PEAKED)
    assert not is_of_a_moment("Is there a dog?", WIDE)
    assert is_of_a_moment("What comes after the dog?", WIDE)
    assert is_of_a_moment("Is there a dog?", torch.tensor([0.9] * 7 + [0.1] * 3))
    assert is_of_a_moment("Is there a dog?", torch.zeros(1))
