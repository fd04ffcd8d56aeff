from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.language.branches import ATTENTION, KeysValues, Watch, _Grid, chunked

CPU = torch.device("cpu")


@given(bins=st.lists(st.integers(0, 4), min_size=1, max_size=12), num_groups=st.integers(1, 3))
def test_each_token_meets_the_matrix_of_its_own_bin(bins, num_groups):
    tokens = torch.randn(len(bins), 2, num_groups, 5)
    matrices = torch.randn(5, 2, 5, 7)
    wanted = torch.stack([token @ matrices[bin_] for token, bin_ in zip(tokens, bins, strict=True)])
    torch.testing.assert_close(_Grid(bins, 5, CPU).product(tokens, matrices), wanted, atol=1e-4, rtol=1e-4)


def test_sequences_are_kept_appended_and_given_room():
    def filled(*values, width):
        layers = [torch.stack([torch.full((2, width, 3), value + layer) for value in values]) for layer in (0.0, 0.5)]
        return KeysValues([layer.clone() for layer in layers], [-layer for layer in layers])

    kv = filled(1.0, 2.0, 3.0, width=4)
    kv.select_and_append([2, 0], filled(9.0, width=2), 5)
    assert kv.num_positions == 5
    for layer, offset in enumerate((0.0, 0.5)):
        assert kv.keys[layer][:, 0, 0, 0].tolist() == [3 + offset, 1 + offset, 9 + offset]
        assert kv.values[layer][:, 0, 0, 0].tolist() == [-3 - offset, -1 - offset, -9 - offset]
        assert kv.keys[layer][2, 0, :, 0].tolist() == [9 + offset, 9 + offset, 0, 0, 0]
    kv.clear()
    assert kv.num_positions == 0


def test_only_watched_layers_are_seen():
    weights = torch.rand(3, 2, 2, 4)
    watch = Watch(frozenset({1, 2}))
    for layer in range(4):
        watch.look(layer, weights * (layer + 1))
    torch.testing.assert_close(watch.seen_TP, weights.mean(dim=(1, 2)) * 2.5)


@given(st.lists(st.integers(1, 9)), st.integers(1, 12))
def test_chunks_hold_so_much_or_one(sizes, most):
    chunks = list(chunked(sizes, most))
    assert [size for chunk in chunks for size in chunk] == sizes
    assert all(sum(chunk) <= most or len(chunk) == 1 for chunk in chunks)
    assert all(sum(chunk) + after[0] > most for chunk, after in pairwise(chunks))


def test_a_model_that_belongs_to_an_engine_says_so(untrained_folder):
    from pipeline.language.longvlm import load_longvlm

    llm = load_longvlm(str(untrained_folder)).llm
    llm.set_attn_implementation(ATTENTION)
    with pytest.raises(ValueError, match="belongs to an engine"):
        llm(input_ids=torch.tensor([[1, 2]]))
