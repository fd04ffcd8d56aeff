import pytest
import torch
from torch import nn

from longvlm.pipeline.training.whitening import SHRINKAGE, fit_whitening, reinitialise
from longvlm.schemas.errors import InputError


def tokens(number=4000, seed=0):
    """Few directions hold nearly all of it, as in patch features."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=random) * torch.logspace(1, -1, 32)
    return torch.randn(number, 32, generator=random) @ mix + 5


def test_whitened_tokens_have_unit_covariance_but_for_the_shrunk_directions():
    found = tokens()
    white = fit_whitening(found.split(100))(found)
    assert white.mean(dim=0).abs().max() < 1e-3
    values = torch.linalg.eigvalsh(torch.cov(white.T))
    plain = torch.linalg.eigvalsh(torch.cov(found.T))
    expected = plain / (plain + SHRINKAGE * plain.mean())
    torch.testing.assert_close(values, expected.sort().values, atol=1e-2, rtol=1e-2)
    assert plain.max() / plain.min() > 1000 * values.max() / values.min()


def test_tokens_are_whitened_as_covariance_says(device, agree):
    found = tokens()
    mean, plain = found.double().mean(dim=0), torch.cov(found.double().T)
    shrunk = plain + SHRINKAGE * plain.diagonal().mean() * torch.eye(32)
    white = fit_whitening([found])(found.to(device))
    assert white.device.type == device.type
    # whatever basis is taken, lengths are those that the inverse of the covariance gives (Mahalanobis)
    centred = found.double() - mean
    agree(white.double().square().sum(dim=1), (centred @ shrunk.inverse() * centred).sum(dim=1), atol=1e-3, rtol=1e-4)


def test_folding_gives_the_same_outputs(device, agree):
    found, linear = tokens(), nn.Linear(32, 24)
    whitening = fit_whitening([found])
    expected = linear(whitening(found))
    linear.to(device)
    weight, bias = whitening.folded(linear.weight.detach(), linear.bias.detach())
    agree(nn.functional.linear(found, weight, bias), expected, atol=1e-3, rtol=1e-4)


def test_a_redrawn_layer_speaks_as_loud_as_words_do(device):
    found, linear, embedding = tokens(), nn.Linear(32, 256, device=device), torch.randn(100, 256, device=device) * 0.3
    reinitialise(linear, embedding, seed=1)
    rows = linear(fit_whitening([found])(found.to(device)))
    assert rows.std().item() == pytest.approx(0.3, rel=0.2)


def test_without_tokens_there_is_nothing_to_fit():
    with pytest.raises(InputError, match="there are none"):
        fit_whitening([])
