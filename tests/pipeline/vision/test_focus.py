import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import segment_of
from stores import token_video as video

from longvlm.pipeline.vision.budget import Budget
from longvlm.pipeline.vision.focus import (
    SKELETON_SHARE,
    SKELETON_TOKENS,
    Layout,
    coarsened,
    gives_way,
    lay_out,
)
from longvlm.pipeline.vision.focus import show as show_coarse


def near(number, **places):
    """Nearness of segments: that of `s3` is given, that of others is 0."""
    nearness = torch.zeros(number)
    for name, value in places.items():
        nearness[int(name[1:])] = value
    return nearness


def show(tokens, layout, budget):
    return show_coarse(tokens, coarsened(tokens, budget), layout, budget)


def test_the_nearest_stay_bit_for_bit_and_the_rest_keeps_a_few_tokens_each():
    tokens = video((16,) * 12)
    budget = Budget(2 + 16 * 4 + SKELETON_TOKENS * 8, focus="question", num_global=2)
    layout = lay_out(tokens, budget, near(12, s3=0.9, s7=0.8, s8=0.7, s2=0.6))
    assert layout == Layout((1,) * 12, (2, 2, 16, 16, 2, 2, 2, 16, 16, 2, 2, 2), (2, 3, 7, 8), (2, 3, 7, 8))
    shown = show(tokens, layout, budget)
    assert shown.counts == layout.targets
    for segment in layout.kept:
        for got, want in zip(segment_of(shown, segment), segment_of(tokens, segment), strict=True):
            assert torch.equal(got, want.to(got.dtype))
    assert shown.sizes.sum() == tokens.sizes.sum()
    assert shown.num_frames == tokens.num_frames
    assert torch.equal(shown.global_tokens, tokens.global_tokens)


def test_what_is_left_over_goes_to_the_next_nearest():
    tokens = video((16,) * 12)
    budget = Budget(16 * 2 + SKELETON_TOKENS * 9 + 7, focus="question")
    layout = lay_out(tokens, budget, near(12, s3=0.9, s7=0.8, s8=0.7))
    assert layout.kept == (3, 7)
    assert layout.targets == (2, 2, 2, 16, 2, 2, 2, 16, 7, 2, 2, 2)
    assert sum(layout.targets) == budget.max_tokens


def test_where_the_rest_would_take_too_much_neighbours_are_joined_on_either_side():
    tokens = video((16,) * 200)
    layout = lay_out(tokens, Budget(90, focus="question"), near(200, s40=0.9, s41=0.8, s42=0.7, s120=0.6))
    assert layout.kept == (40, 41, 42)
    alone = [i for i, number in enumerate(layout.members) if number == 1]
    assert len(alone) == 4
    assert sum(layout.members) == 200
    assert sum(layout.targets) == 90
    rest = sum(target for i, target in enumerate(layout.targets) if i not in alone)
    assert rest <= 90 * SKELETON_SHARE
    gaps = (layout.members[: alone[0]], layout.members[alone[2] + 1 : alone[3]], layout.members[alone[3] + 1 :])
    assert [sum(gap) for gap in gaps] == [40, 77, 79]
    assert all(max(gap) - min(gap) <= 1 for gap in gaps)
    shown = show(tokens, layout, Budget(90, focus="question"))
    assert shown.num_frames == tuple(10 * number for number in layout.members)
    assert shown.sizes.sum() == tokens.sizes.sum()


def test_a_segment_may_be_all_that_is_shown_better_and_merged_itself():
    layout = lay_out(video((80,) * 4), Budget(30, focus="question"), near(4, s2=0.9))
    assert layout == Layout((1,) * 4, (2, 2, 24, 2), (2,), ())


def test_no_more_than_the_cap_of_a_segment_is_shown():
    layout = lay_out(video((80,) * 4), Budget(34, tokens_per_segment=12, focus="question"), near(4, s2=0.9, s1=0.8))
    assert layout == Layout((1,) * 4, (8, 12, 12, 2), (0, 1, 2), (1, 2))


def test_all_that_stands_beside_blocks_counts():
    layout = lay_out(video((16,) * 12), Budget(88, focus="question", num_beside=3), near(12, s3=0.9, s7=0.8))
    assert layout.kept == (0, 3, 7)
    assert layout.members == (1, 2, 1, 1, 2, 1, 2, 2)
    assert sum(layout.targets) + 3 * len(layout.targets) == 88
    assert sum(layout.targets) - 3 * 16 + 3 * 5 <= 88 * SKELETON_SHARE + 16


@pytest.mark.parametrize("max_tokens", [None, 64, 65])
def test_nothing_gives_way_where_all_is_within_the_budget(max_tokens):
    budget = Budget(max_tokens, focus="question")
    assert not gives_way(video((16,) * 4), budget)
    assert lay_out(video((16,) * 4), budget, torch.zeros(4)) is None


def test_without_room_for_the_nearest_beside_the_rest_nothing_is_laid_out():
    tokens = video((16,) * 4)
    assert lay_out(tokens, Budget(2, focus="question"), near(4, s1=0.9)) is None
    assert lay_out(tokens, Budget(5, focus="question"), near(4, s1=0.9)).targets == (1, 3, 1)
    assert lay_out(tokens, Budget(5, focus="question", num_beside=1), near(4, s1=0.9)) is None


def test_segments_of_unknown_nearness_are_the_farthest_and_of_equals_the_earlier_is_nearer():
    nearness = torch.full((4,), torch.nan)
    nearness[2] = -0.5
    assert lay_out(video((16,) * 4), Budget(22, focus="question"), nearness).kept == (2,)
    assert lay_out(video((16,) * 4), Budget(22, focus="question"), torch.zeros(4)).kept == (0,)


def test_every_segment_needs_a_nearness():
    with pytest.raises(ValueError, match="nearness of each of the 4 segments"):
        lay_out(video((16,) * 4), Budget(10, focus="question"), torch.zeros(3))


def test_segments_that_are_kept_are_not_capped_where_long_runs_are_merged_in_rounds():
    tokens = video((200,) * 60)
    budget = Budget(400, focus="question")
    layout = lay_out(tokens, budget, near(60, s30=0.9))
    assert layout.kept == (30,)
    shown = show(tokens, layout, budget)
    place = layout.targets.index(200)
    assert torch.equal(segment_of(shown, place)[0], segment_of(tokens, 30)[0].float())
    assert shown.sizes.sum() == tokens.sizes.sum()


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=25).map(tuple),
    max_tokens=st.integers(3, 400),
    cap=st.none() | st.integers(1, 30),
    beside=st.integers(0, 5),
    seed=st.integers(0, 50),
)
@settings(max_examples=200)
def test_whatever_is_asked_the_budget_is_used_and_everything_is_shown(counts, max_tokens, cap, beside, seed):
    tokens = video(counts, seed=seed)
    budget = Budget(max_tokens, tokens_per_segment=cap, focus="question", num_global=2, num_beside=beside)
    nearness = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed))
    layout = lay_out(tokens, budget, nearness)
    if layout is None:
        caps = [min(count, cap or count) + beside for count in counts]
        assert sum(caps) <= max_tokens - 2 or max_tokens - 2 < 3 * (3 + beside)
        return
    shown = show(tokens, layout, budget)
    assert shown.counts == layout.targets
    assert min(layout.targets) >= 1
    assert sum(layout.members) == len(counts)
    assert shown.sizes.sum() == tokens.sizes.sum()
    starts = [sum(layout.members[:i]) for i in range(len(layout.members))]
    assert [shown.num_frames[i] for i in range(len(starts))] == [10 * number for number in layout.members]
    caps = [cap or 40] * len(counts)
    for segment in layout.kept:
        place = starts.index(segment)
        assert layout.members[place] == 1
        assert layout.targets[place] == min(counts[segment], caps[segment])
    others = sorted(set(range(len(counts))) - set(layout.kept))
    if layout.kept and others:
        assert min(nearness[list(layout.kept)]) >= max(nearness[others])
    rows = sum(layout.targets) + beside * len(layout.targets)
    assert rows <= max_tokens - 2
    most = sum(min(cap or 40, counts[s]) for i, s in enumerate(starts) if layout.members[i] == 1)
    joined = [
        sum(min(cap or 40, count) for count in counts[s : s + n])
        for s, n in zip(starts, layout.members, strict=True)
        if n > 1
    ]
    assert rows == min(max_tokens - 2, most + sum(joined) + beside * len(layout.targets))
