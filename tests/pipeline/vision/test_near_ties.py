import pytest
import torch
from near_ties import NOISE, Merging

from longvlm.pipeline.vision.merge import MergeMetric, merge

STEPS = [20, 10, 4]


def random_tokens():
    return torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))


def tied_tokens():
    """In the first of two segments token 4 is as near to token 7 as to token 11, which are one and the same."""
    tokens = random_tokens()
    tokens[0, 11] = tokens[0, 7]
    tokens[0, 4] = tokens[0, 7] + 0.1 * tokens[0, 4]
    return tokens


def the_other_way(tokens):
    """Who rounds in favour of token 11 gets this."""
    tokens = tokens.clone()
    tokens[0, 11] += 1e-4 * tokens[0, 4]
    return tokens


def test_an_exact_tie_is_recognised_and_all_else_is_held(agree):
    tokens = tied_tokens()
    ours, theirs = merge(tokens, STEPS[:1]), merge(the_other_way(tokens), STEPS[:1])
    differs = ours.sizes != theirs.sizes
    assert differs.nonzero().tolist() == [[0, 3], [0, 5]]  # the odd tokens 7 and 11, one of which token 4 joins
    merging = Merging(tokens, STEPS[:1])
    assert torch.equal(merging.settled(differs), ~differs)
    merging.hold(agree, ours.sizes, theirs.sizes)
    merging.hold(agree, ours.tokens, theirs.tokens, atol=1e-5)
    merging.hold(agree, ours.tokens.flatten(0, 1), theirs.tokens.flatten(0, 1), atol=1e-5)
    with pytest.raises(AssertionError):
        agree(ours.tokens, theirs.tokens, atol=1e-5)


def test_what_follows_from_a_tie_in_later_steps_is_recognised(agree):
    tokens = tied_tokens()
    ours, theirs = merge(tokens, STEPS[:2]), merge(the_other_way(tokens), STEPS[:2])
    assert not torch.equal(ours.sizes, theirs.sizes)
    Merging(tokens, STEPS[:2]).hold(agree, ours.tokens, theirs.tokens, atol=1e-5)


def test_a_tie_in_the_order_of_those_that_stay_is_recognised(agree):
    tokens = random_tokens()
    tokens[0, 2] = 2 * tokens[0, 0]  # no cosine tells them apart
    ours = merge(tokens, [6]).tokens
    places = [int((ours[0] - tokens[0, token]).abs().sum(dim=-1).argmin()) for token in (0, 2)]
    theirs = ours.clone()
    theirs[0, places] = ours[0, places[::-1]]
    Merging(tokens, [6]).hold(agree, ours, theirs, atol=1e-5)
    theirs[0, [12, 13]] = ours[0, [13, 12]]  # of two others
    with pytest.raises(AssertionError):
        Merging(tokens, [6]).hold(agree, ours, theirs, atol=1e-5)


def halves_exchanged(tokens):
    return merge(tokens.unflatten(1, (-1, 2)).flip(2).flatten(1, 2), STEPS)


def means_of_means(tokens):
    return merge(merge(tokens, STEPS[:1]).tokens, STEPS[1:])


def one_joins_another(tokens):
    tokens = tokens.clone()
    tokens[1, 0] = tokens[1, 39] + 1e-3 * tokens[1, 0]
    return merge(tokens, STEPS)


def of_other_heads(tokens):
    return merge(tokens, STEPS, metric=MergeMetric(8))


@pytest.mark.parametrize("tokens", [random_tokens(), tied_tokens()], ids=["random", "tied"])
@pytest.mark.parametrize("wrong", [halves_exchanged, means_of_means, one_joins_another, of_other_heads])
def test_a_mistake_is_none(wrong, tokens, agree):
    with pytest.raises(AssertionError):
        Merging(tokens, STEPS).hold(agree, wrong(tokens).tokens, merge(tokens, STEPS).tokens, atol=1e-5)


def test_a_single_row_of_a_wrong_weight_is_no_near_tie(agree):
    tokens = random_tokens()
    ours, theirs = merge(tokens, STEPS).tokens, merge(tokens, STEPS).tokens
    theirs[1, 3] *= 1.001
    with pytest.raises(AssertionError):
        Merging(tokens, STEPS).hold(agree, ours, theirs, atol=1e-5)


def test_where_most_is_tied_nothing_can_be_compared(agree):
    tokens = random_tokens()[:, :10].repeat(1, 4, 1)
    noise = NOISE * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(9))
    ours, theirs = merge(tokens, STEPS), merge(tokens + noise, STEPS)
    with pytest.raises(AssertionError, match="differ as near-ties: too many"):
        Merging(tokens, STEPS).hold(agree, ours.tokens, theirs.tokens, atol=1e-5)
