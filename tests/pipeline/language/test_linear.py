import pytest
import torch
from torch import nn

from pipeline.language.linear import FewTokensLinear, quicken


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_layer_it_stands_for(num_tokens, bias):
    layer = nn.Linear(24, 40, bias=bias)
    given = torch.randn(1, num_tokens, 24)
    found = FewTokensLinear(layer)(given)
    assert found.is_contiguous()
    torch.testing.assert_close(found, layer(given), atol=1e-5, rtol=1e-5)


def test_only_bfloat16_on_a_cpu_is_changed_and_weights_are_shared():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4)))
    quicken(model)
    assert type(model[1][0]) is nn.Linear
    model = model.to(torch.bfloat16)
    weight = model[1][0].weight
    quicken(model)
    assert type(model[1][0]) is FewTokensLinear
    assert model[1][0].weight is weight
