from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from longvlm.pipeline.engine.attention import AttentionTotals, KeysValues, _Grid, chunked


@given(bins=st.lists(st.integers(0, 4), min_size=1, max_size=12), num_groups=st.integers(1, 3))
def test_each_token_meets_the_matrix_of_its_own_bin(bins, num_groups):
    tokens = torch.randn(len(bins), 2, num_groups, 5)
    matrices = torch.randn(5, 2, 5, 7)
    wanted = torch.stack([token @ matrices[bin_] for token, bin_ in zip(tokens, bins, strict=True)])
    torch.testing.assert_close(
        _Grid(bins, 5, tokens).product(tokens, matrices.flatten(0, 1), 0.5), 0.5 * wanted, atol=1e-4, rtol=1e-4
    )


def test_sequences_are_kept_appended_and_given_room():
    def filled(*values, width):
        layers = [torch.stack([torch.full((2, width, 3), value + layer) for value in values]) for layer in (0.0, 0.5)]
        return KeysValues([torch.stack([layer, -layer]) for layer in layers])

    kv = filled(1.0, 2.0, 3.0, width=4)
    kv.select_and_append([2, 0], filled(9.0, width=2), 5)
    assert kv.num_positions == 5
    for layer, offset in zip(kv.layers, (0.0, 0.5), strict=True):
        assert layer[0, :, 0, 0, 0].tolist() == [3 + offset, 1 + offset, 9 + offset]
        assert layer[0, 2, 0, :, 0].tolist() == [9 + offset, 9 + offset, 0, 0, 0]
        assert layer[1].equal(-layer[0])
    assert {layer.shape for layer in kv.layers} == {(2, 3, 2, 5, 3)}
    kv.clear()
    assert kv.num_positions == 0


def test_keys_and_values_are_written_where_they_belong():
    kv = KeysValues([torch.zeros(2, 3, 2, 4, 5)])
    given = torch.randn(2, 2, 2, 5)
    kv.write(0, torch.tensor([2, 0]), torch.tensor([1, 3]), given)
    assert kv.layers[0][:, 2, :, 1].equal(given[0])
    assert kv.layers[0][:, 0, :, 3].equal(given[1])
    assert int((kv.layers[0] != 0).sum()) == given.numel()


def test_only_watched_layers_are_seen():
    weights = torch.rand(3, 2, 2, 4)
    totals = AttentionTotals(frozenset({1, 2}))
    for layer in range(4):
        totals.look(layer, weights * (layer + 1))
    torch.testing.assert_close(totals.seen, weights.mean(dim=(1, 2)) * 2.5)


@given(st.lists(st.integers(1, 9)), st.integers(1, 12))
def test_chunks_hold_so_much_or_one(sizes, most):
    chunks = list(chunked(sizes, most))
    assert [size for chunk in chunks for size in chunk] == sizes
    assert all(sum(chunk) <= most or len(chunk) == 1 for chunk in chunks)
    assert all(sum(chunk) + after[0] > most for chunk, after in pairwise(chunks))
