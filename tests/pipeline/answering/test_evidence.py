import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvlm.pipeline.answering.evidence import describe, fold
from longvlm.pipeline.vision.tokens import VideoTokens


def video(spans, num_global=0, dim=16) -> VideoTokens:
    num_tokens = len(spans)
    ones = torch.ones(num_tokens, dtype=torch.int64)
    return VideoTokens(
        torch.zeros(num_tokens, dim), ones, torch.tensor(spans), (num_tokens,), (1,), torch.zeros(num_global, dim)
    )


def segments(*bounds):
    """Rows of `segments` of 10 s each, with the frames given."""
    return [
        {"segment": i, "start_s": 10.0 * i, "end_s": 10.0 * i + 10, "first_frame": first, "last_frame": last}
        for i, (first, last) in enumerate(bounds)
    ]


FOUR = segments((0, 9), (10, 19), (20, 29), (30, 39))


def starts(evidence):
    return [(span["start_s"], round(span["weight"], 6)) for span in evidence]


def test_tokens_give_their_attention_to_the_segment_they_come_from():
    tokens = video([(0, 5), (12, 12), (13, 19), (35, 39)])
    found = fold(torch.tensor([0.1, 0.2, 0.3, 0.4]), tokens, 0, FOUR)
    assert starts(found) == [(10.0, 0.5), (30.0, 0.4), (0.0, 0.1)]
    assert found[0] == {"start_s": 10.0, "end_s": 20.0, "weight": pytest.approx(0.5)}


def test_a_token_merged_over_segments_is_shared_out_by_its_frames():
    found = fold(torch.tensor([1.0]), video([(5, 22)]), 0, FOUR)  # 5 frames, 10 frames, 3 frames
    assert starts(found) == [(10.0, round(10 / 18, 6)), (0.0, round(5 / 18, 6)), (20.0, round(3 / 18, 6))]


def test_global_rows_are_left_out_and_the_top_three_sum_to_one():
    attention = torch.tensor([9.0, 9.0, 0.1, 0.2, 0.3, 0.4])
    tokens = video([(0, 0), (10, 10), (20, 20), (30, 30)], num_global=2)
    found = fold(attention, tokens, 2, FOUR)
    assert starts(found) == [(30.0, round(4 / 9, 6)), (20.0, round(3 / 9, 6)), (10.0, round(2 / 9, 6))]


def test_equals_come_in_time_order_and_segments_without_attention_not_at_all():
    tokens = video([(30, 30), (0, 0)])
    assert starts(fold(torch.tensor([0.5, 0.5]), tokens, 0, FOUR)) == [(0.0, 0.5), (30.0, 0.5)]


def test_frames_between_segments_belong_to_none():
    sparse = segments((0, 4), (10, 14))
    assert starts(fold(torch.tensor([0.5, 0.5]), video([(6, 8), (3, 10)]), 0, sparse)) == [
        (0.0, round(2 / 3, 6)),
        (10.0, round(1 / 3, 6)),
    ]


@pytest.mark.parametrize("attention", [None, torch.zeros(1), torch.tensor([torch.nan]), torch.tensor([torch.inf])])
def test_where_there_is_no_attention_there_is_no_evidence(attention):
    assert fold(attention, video([(0, 0)]), 0, FOUR) == []


def test_attention_of_another_prefix_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="3 attentions for 1 global and 1 local"):
        fold(torch.ones(3), video([(0, 0)], num_global=1), 1, FOUR)


@given(
    spans=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted), min_size=1, max_size=30),
    cuts=st.sets(st.integers(1, 99), max_size=12),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_shares_are_those_of_counting_frame_by_frame(spans, cuts, seed):
    edges = [0, *sorted(cuts), 100]
    rows = segments(*[(first, last - 1) for first, last in pairwise(edges)])
    attention = torch.rand(len(spans), generator=torch.Generator().manual_seed(seed)) + 0.01
    want = [0.0] * len(rows)
    for (first, last), weight in zip(spans, attention.tolist(), strict=True):
        for i, row in enumerate(rows):
            frames = [f for f in range(first, last + 1) if row["first_frame"] <= f <= row["last_frame"]]
            want[i] += weight * len(frames) / (last - first + 1)
    found = fold(attention, video(spans), 0, rows)
    assert math.isclose(sum(span["weight"] for span in found), 1)
    top = sorted(want, reverse=True)[:3]
    for span, value in zip(found, top, strict=False):
        assert math.isclose(span["weight"] * sum(top), value, rel_tol=1e-5)
        assert {"start_s": span["start_s"], "end_s": span["end_s"]} in [
            {name: row[name] for name in ("start_s", "end_s")} for row in rows
        ]


def seconds(found):
    return [(span["start_s"], span["end_s"]) for span in found]


ONE_A_SECOND = [{**FOUR[0], "frames": list(range(0, 250, 25)), "times_s": [i + 0.5 for i in range(10)]}]
ONE_A_SECOND[0]["last_frame"] = 225


def test_tokens_of_few_frames_say_when_in_a_segment_it_was():
    tokens = video([(75, 100), (175, 175), (0, 225)])
    found = fold(torch.tensor([1.0, 0.2, 0.1]), tokens, 0, ONE_A_SECOND)
    assert found == [{"start_s": 3.0, "end_s": 5.0, "weight": pytest.approx(1)}]  # halfway between frames
    assert seconds(fold(torch.tensor([0.1, 1.0, 0.1]), tokens, 0, ONE_A_SECOND)) == [(7.0, 8.0)]


def test_where_tokens_of_many_frames_drew_most_the_whole_segment_is_told():
    tokens = video([(75, 100), (175, 175), (0, 225)])
    assert seconds(fold(torch.tensor([1.0, 0.2, 3.0]), tokens, 0, ONE_A_SECOND)) == [(0.0, 10.0)]
    assert seconds(fold(torch.tensor([1.0]), video([(25, 150)]), 0, ONE_A_SECOND)) == [(0.0, 10.0)]  # six of ten


def test_the_shortest_run_that_holds_half_is_told_and_of_equals_the_one_that_holds_most():
    tokens = video([(25, 25), (50, 50), (150, 150), (175, 175)])
    assert seconds(fold(torch.tensor([0.25, 0.25, 0.25, 0.25]), tokens, 0, ONE_A_SECOND)) == [(1.0, 3.0)]
    assert seconds(fold(torch.tensor([0.2, 0.3, 0.35, 0.2]), tokens, 0, ONE_A_SECOND)) == [(6.0, 8.0)]
    assert seconds(fold(torch.tensor([0.6, 0.1, 0.1, 0.1]), tokens, 0, ONE_A_SECOND)) == [(1.0, 2.0)]


def test_a_frame_that_stays_on_the_screen_is_told_as_long_as_it_stays():
    slides = [{**segments((4, 6))[0], "frames": [4, 5, 6], "times_s": [0.0, 2.0, 9.0]}]
    for frame, shown in ((4, (0.0, 2.0)), (5, (2.0, 9.0)), (6, (9.0, 10.0))):
        tokens = video([(frame, frame), (4, 6)])
        assert seconds(fold(torch.tensor([0.8, 0.2]), tokens, 0, slides)) == [shown]


def test_rows_of_before_and_tokens_of_several_segments_tell_whole_segments():
    before = [{**ONE_A_SECOND[0], "frames": None, "times_s": None}]
    assert seconds(fold(torch.tensor([1.0]), video([(75, 75)]), 0, before)) == [(0.0, 10.0)]
    timed = [row | {"frames": list(range(row["first_frame"], row["last_frame"] + 1))} for row in FOUR]
    timed = [row | {"times_s": [float(frame) for frame in row["frames"]]} for row in timed]
    assert seconds(fold(torch.tensor([1.0]), video([(0, 19)]), 0, timed)) == [(0.0, 10.0), (10.0, 20.0)]


@given(
    spans=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=1, max_size=12),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_what_is_told_is_the_shortest_that_holds_half_by_counting(spans, seed):
    attention = torch.rand(len(spans), generator=torch.Generator().manual_seed(seed)) + 0.01
    row = {**FOUR[0], "frames": list(range(10)), "times_s": [float(frame) for frame in range(10)]}
    (found,) = fold(attention, video(spans), 0, [row])
    total, frames = float(attention.double().sum()), [0.0] * 10
    for (first, last), weight in zip(spans, attention.tolist(), strict=True):
        drawn_on = range(first, last + 1) if last - first < 3 else range(10)
        for frame in drawn_on:
            frames[frame] += weight / len(drawn_on)
    lengths = [n for n in (1, 2, 3) if any(sum(frames[f : f + n]) >= total / 2 - 1e-9 for f in range(10))]
    start, end = int(found["start_s"]), int(found["end_s"])
    assert end - start == (lengths or [10])[0]
    assert sum(frames[start:end]) >= total / 2 - 1e-6


def test_evidence_reads_as_times_and_percent():
    evidence = [
        {"start_s": 12.0, "end_s": 18.9, "weight": 0.41},
        {"start_s": 3723.0, "end_s": 3733.0, "weight": 0.22},
    ]
    assert describe(evidence) == "0:12-0:18 (41 %), 1:02:03-1:02:13 (22 %)"
    assert describe([]) == ""
