from dataclasses import replace

import pytest
import torch

from longvlm.pipeline.engine.logits import choose, distinct_endings, draw, likelihoods
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import AnswerRecipe

GREEDY = AnswerRecipe("model", "weights", "index")
FREE = replace(GREEDY, temperature=1.0)
WANTED = torch.tensor([0.6, 0.25, 0.1, 0.05, 0])


def shares(recipe, num_drawn=4000):
    logits = torch.full((num_drawn, 50), -50.0)
    logits[:, :4] = WANTED[:4].log()
    drawn = choose(logits, torch.rand(num_drawn, generator=torch.Generator().manual_seed(0)), recipe)
    return torch.bincount(drawn, minlength=5)[:5] / num_drawn


def test_without_temperature_the_likeliest_is_chosen():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.0]])
    assert choose(logits, None, GREEDY).tolist() == [1, 0]


def test_sampling_draws_from_the_softmax():
    torch.testing.assert_close(shares(FREE), WANTED, atol=0.03, rtol=0)


def test_top_p_leaves_the_likeliest_that_hold_so_much():
    wanted = torch.tensor([0.6, 0.25, 0, 0, 0]) / 0.85
    torch.testing.assert_close(shares(replace(FREE, top_p=0.8)), wanted, atol=0.03, rtol=0)
    assert shares(replace(FREE, top_p=1e-9))[0] == 1


def test_temperature_sharpens():
    wanted = WANTED**2 / (WANTED**2).sum()
    torch.testing.assert_close(shares(replace(FREE, temperature=0.5)), wanted, atol=0.03, rtol=0)


@pytest.mark.parametrize("recipe", [GREEDY, FREE], ids=["greedy", "sampled"])
def test_rows_that_overflowed_have_no_next_token(recipe):
    logits = torch.tensor([[0.0, 9.0], [float("nan"), 1.0], [9.0, float("-inf")]])
    drawn = torch.tensor([0.1, 0.5, 0.9]) if recipe.temperature else None
    assert choose(logits, drawn, recipe).tolist() == [1, -1, 0]


def test_random_numbers_follow_from_seed_and_question():
    assert draw(FREE, "What?", 40)[:3].equal(draw(FREE, "What?", 3))
    firsts = [draw(FREE, "What?", 1), draw(FREE, "Who?", 1), draw(replace(FREE, seed=1), "What?", 1)]
    assert len(set(map(float, firsts))) == 3


def test_an_option_that_another_goes_on_from_is_closed_by_the_end_mark():
    assert distinct_endings(["red", "red car", "blue"], [(5,), (5, 6), (7,)], 2) == [(5, 2), (5, 6), (7,)]


def test_options_that_cannot_be_told_apart_are_refused():
    with pytest.raises(TerminalError, match="'gnu' and 'emu' apart") as raised:
        distinct_endings(["gnu", "cat", "emu"], [(0,), (4,), (0,)], 2)
    assert raised.value.code is ErrorCode.ANSWER_FAILED
    with pytest.raises(TerminalError, match="' ' has no tokens"):
        distinct_endings(["yes", " "], [(3,), ()], 2)


def test_likelihoods_add_up_over_the_ids_of_a_sequence():
    logits = torch.randn(5, 9)
    logp = logits.log_softmax(1)
    found = likelihoods(logits, [(0, (3,)), (2, (1, 8, 4)), (2, (7,))])
    wanted = [logp[0, 3], logp[2, 1] + logp[3, 8] + logp[4, 4], logp[2, 7]]
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=0)
