import pytest
import torch
from torch import nn

from longvlm.pipeline.engine.linear import Linear


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_it_stands_for(num_tokens, bias):
    layer = nn.Linear(24, 40, bias=bias)
    given = torch.randn(num_tokens, 24)
    found = Linear([layer])(given)
    assert found.is_contiguous()
    torch.testing.assert_close(found, layer(given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 17])
def test_few_tokens_in_bfloat16_are_multiplied_the_other_way_round(num_tokens):
    layer = nn.Linear(24, 40).to(torch.bfloat16)
    given = torch.randn(num_tokens, 24, dtype=torch.bfloat16)
    found = Linear([layer])(given)
    assert found.is_contiguous()
    torch.testing.assert_close(found, layer(given), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_side_by_side_share_one_matrix_with_the_model(bias):
    layers = [nn.Linear(24, width, bias=bias) for width in (8, 4, 4)]
    given = torch.randn(3, 24)
    wanted = torch.cat([layer(given) for layer in layers], dim=1).detach()
    joined = Linear(layers)
    torch.testing.assert_close(joined(given), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([layer(given) for layer in layers], dim=1), wanted, atol=1e-5, rtol=1e-5)
    again = Linear(layers)
    assert again.weight.data_ptr() == joined.weight.data_ptr() == layers[0].weight.data_ptr()
    assert again.weight.equal(joined.weight)
    layers[2].weight.data.fill_(0)
    assert (joined(given)[:, 12:] == (layers[2].bias if bias else 0)).all()


def test_weights_that_lie_side_by_side_by_chance_stay_where_they_are():
    whole = torch.randn(12, 24)
    layers = [nn.Linear(24, 4, bias=False) for _ in range(3)]
    for layer, part in zip(layers, whole.split(4), strict=True):
        layer.weight = nn.Parameter(part)
    assert Linear(layers).weight.data_ptr() == whole.data_ptr()
    assert Linear(layers[::2]).weight.equal(torch.cat([whole[:4], whole[8:]]))
