import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import segment_of
from stores import token_video as video

from longvlm.pipeline.vision.budget import Budget, fit
from longvlm.pipeline.vision.merge import merge
from longvlm.pipeline.vision.tokens import VideoTokens
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import halving_schedule


def test_where_there_is_nothing_to_do_the_tokens_are_the_very_same():
    tokens = video((8, 8, 5))
    assert fit(tokens, Budget(num_global=2)) is tokens
    assert fit(tokens, Budget(23, num_global=2)) is tokens
    assert fit(tokens, Budget(23, tokens_per_segment=8, focus="even", num_global=2)) is tokens


@pytest.mark.parametrize("target", [1, 7, 30, 40, 79])
def test_every_segment_goes_on_where_its_stored_merge_stopped(target):
    tokens = video((80, 80, 80, 25))
    fitted = fit(tokens, Budget(tokens_per_segment=target))
    assert fitted.counts == tuple(min(target, count) for count in tokens.counts)
    for i, count in enumerate(tokens.counts):
        local, sizes, spans = segment_of(tokens, i)
        want = merge(local[None], halving_schedule(count, target), sizes=sizes[None], spans=spans[None])
        got_local, got_sizes, got_spans = segment_of(fitted, i)
        torch.testing.assert_close(got_local, want.tokens[0], atol=1e-6, rtol=1e-6)
        assert torch.equal(got_sizes, want.sizes[0])
        assert torch.equal(got_spans, want.spans[0])


def test_eighty_stored_tokens_read_as_thirty_are_the_papers_thirty():
    inputs = torch.randn(2, 2560, 64, generator=torch.Generator().manual_seed(3))
    direct = merge(inputs, halving_schedule(2560, 30))
    stored = merge(inputs, halving_schedule(2560, 80))
    tokens = VideoTokens(
        stored.tokens.flatten(0, 1), stored.sizes.flatten(), stored.spans.flatten(0, 1), (80, 80), (10, 10),
        torch.empty(0, 64),
    )  # fmt: skip
    fitted = fit(tokens, Budget(60))
    torch.testing.assert_close(fitted.local, direct.tokens.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(fitted.sizes, direct.sizes.flatten())
    assert torch.equal(fitted.spans, direct.spans.flatten(0, 1))


def test_rounding_to_float16_in_between_changes_little():
    moving = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).repeat(2, 2560, 1)
    moving += 0.2 * torch.randn(2, 2560, 64, generator=torch.Generator().manual_seed(2)).cumsum(1) / 50
    direct = merge(moving, halving_schedule(2560, 30)).tokens
    stored = merge(moving, halving_schedule(2560, 80))
    local = stored.tokens.half().flatten(0, 1)
    tokens = VideoTokens(
        local, stored.sizes.flatten(), stored.spans.flatten(0, 1), (80, 80), (10, 10), torch.empty(0, 64)
    )
    fitted = fit(tokens, Budget(tokens_per_segment=30))
    near = torch.cosine_similarity(fitted.local, direct.flatten(0, 1), dim=-1)
    assert near.median() > 0.999


def test_the_budget_is_shared_equally_and_the_rest_spread_over_time():
    assert fit(video((80,) * 4), Budget(122, num_global=2)).counts == (30,) * 4
    assert fit(video((80,) * 8), Budget(244, num_global=2)).counts == (30, 30, 31, 30, 30, 30, 31, 30)
    assert fit(video((80, 12, 80)), Budget(74, num_global=2)).counts == (30, 12, 30)
    assert fit(video((80,) * 4), Budget(10, num_global=2)).counts == (2, 2, 2, 2)
    assert fit(video((80,) * 4), Budget(6, num_global=2)).counts == (1, 1, 1, 1)


def test_global_rows_count_against_the_budget_and_stay_as_they_are():
    tokens = video((40, 40))
    fitted = fit(tokens, Budget(32, num_global=2))
    assert len(fitted.prefix()) == 32
    assert torch.equal(fitted.global_tokens, tokens.global_tokens)
    assert len(fit(tokens, Budget(32)).prefix(with_global=False)) == 32


@pytest.mark.parametrize("focus", [None, "even", "question"])
def test_a_budget_that_global_rows_fill_is_too_small(focus):
    with pytest.raises(TerminalError, match="2 visual tokens has no room beside 2 global ones") as caught:
        fit(video((8, 8)), Budget(2, focus=focus, num_global=2))
    assert caught.value.code == ErrorCode.BUDGET_TOO_SMALL


def test_less_than_a_token_a_segment_needs_a_focus():
    with pytest.raises(TerminalError, match=r"5 visual tokens, 2 of them global.*4 segments.*--focus even") as caught:
        fit(video((8,) * 4), Budget(5, num_global=2))
    assert caught.value.code == ErrorCode.BUDGET_TOO_SMALL


def test_a_focus_changes_nothing_where_every_segment_is_held():
    tokens = video((80,) * 6)
    for focus in ("even", "question"):
        fitted = fit(tokens, Budget(62, focus=focus, num_global=2))
        assert fitted.counts == (10,) * 6
        assert torch.equal(fitted.local, fit(tokens, Budget(62, num_global=2)).local)


def test_even_focus_merges_neighbours_in_runs_that_differ_by_one_segment_at_most():
    tokens = video((16,) * 11)
    fitted = fit(tokens, Budget(42, focus="even", num_global=2))
    assert fitted.num_frames == (20, 30, 30, 30)
    assert fitted.counts == (10,) * 4
    joined = [(0, 2), (2, 5), (5, 8), (8, 11)]
    for i, (first, last) in enumerate(joined):
        spans = segment_of(fitted, i)[2]
        assert (spans.min() // 10, spans.max() // 10) == (first, last - 1)
    assert torch.equal(fitted.global_tokens, tokens.global_tokens)


def test_runs_too_long_for_one_merge_are_merged_in_rounds():
    tokens = video((80,) * 150)
    fitted = fit(tokens, Budget(20, focus="even"))
    assert fitted.num_frames == (750, 750)
    assert fitted.sizes.sum() == tokens.sizes.sum()
    assert segment_of(fitted, 0)[2].max() < 750 <= segment_of(fitted, 1)[2].min()
    unmerged = video((2600, 2600), seed=1)
    assert fit(unmerged, Budget(10, focus="even")).counts == (10,)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=25).map(tuple),
    budget=st.integers(3, 400),
    cap=st.none() | st.integers(1, 30),
    focus=st.sampled_from([None, "even", "question"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=150)
def test_whatever_is_asked_the_budget_holds_and_nothing_is_made_up(counts, budget, cap, focus, seed):
    tokens = video(counts, seed=seed)
    asked = Budget(budget, tokens_per_segment=cap, focus=focus, num_global=2)
    if focus is None and len(counts) > budget - 2:
        with pytest.raises(TerminalError):
            fit(tokens, asked)
        return
    fitted = fit(tokens, asked)
    assert len(fitted.prefix()) <= budget
    assert max(fitted.counts) <= (cap or max(sum(counts), 1))
    spans = [segment_of(fitted, i)[2] for i in range(len(fitted.counts))]
    firsts, lasts = ([int(value) for value in ends] for ends in ((s.min() for s in spans), (s.max() for s in spans)))
    assert firsts == sorted(firsts)
    assert all(last < first for last, first in zip(lasts, firsts[1:], strict=False))
    assert (fitted.spans[:, 0] <= fitted.spans[:, 1]).all()
    assert int(fitted.spans.min()) >= 0
    assert int(fitted.spans.max()) <= int(tokens.spans.max())
    assert fitted.sizes.sum() == tokens.sizes.sum()
    assert sum(fitted.num_frames) == sum(tokens.num_frames)
    sums = [(part.local.double() * part.sizes[:, None]).sum(0) for part in (tokens, fitted)]
    torch.testing.assert_close(sums[1], sums[0], atol=2e-3, rtol=1e-3)


def test_rows_beside_each_segment_count_against_the_budget():
    tokens = video((80,) * 4)
    assert fit(tokens, Budget(122 + 16, num_global=2, num_beside=4)).counts == (30,) * 4
    assert fit(tokens, Budget(138, focus="even", num_global=2, num_beside=4)).counts == (30,) * 4
    joined = fit(tokens, Budget(2 + 40, focus="even", num_global=2, num_beside=4))
    assert joined.counts == (16, 16)  # two runs of ten tokens or more with their markers, and not four
    with pytest.raises(TerminalError, match="is less than one for each of the 4 segments"):
        fit(tokens, Budget(21, num_global=2, num_beside=4))
    assert fit(tokens, Budget(num_global=2, num_beside=4)) is tokens


def test_a_video_is_held_if_its_rows_and_all_beside_them_are():
    tokens = video((80,) * 4)
    assert Budget(2 + 320 + 16, num_global=2, num_beside=4).holds(tokens)
    assert not Budget(2 + 320 + 15, num_global=2, num_beside=4).holds(tokens)
    assert Budget(num_global=2, num_beside=4).holds(tokens)
