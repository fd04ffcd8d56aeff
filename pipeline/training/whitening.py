"""PCA whitening of stored tokens, turned and scaled so that every direction is equally easy to learn from.

Patch features lie in a few directions: a linear projector sees those at once and the others hardly at all. While
training it is given whitened tokens; when saved, the whitening becomes a part of its weights.

Shape letters: N tokens, C tower channels, D model width.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longvlm.schemas.errors import InputError

SHRINKAGE = 1e-3  # of the covariance towards its mean variance: directions that hold next to nothing are not blown up
SAMPLED_TOKENS = 20_000  # enough for the covariance of a thousand channels


@dataclass(frozen=True, eq=False)
class Whitening:
    """An affine map x -> (x - mean) P, after which the tokens it was fitted to have about unit covariance."""

    mean: Tensor  # [C]
    basis: Tensor  # P, [C, C]

    def __call__(self, prefix_NC: Tensor) -> Tensor:
        """Whitened tokens, float32."""
        return (prefix_NC.float() - self.mean.to(prefix_NC.device)) @ self.basis.to(prefix_NC.device)

    def folded(self, weight_DC: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias that do to plain tokens what the given ones do to whitened ones.

        With rows as vectors: (x - m) P W^T + b = x (W P^T)^T + (b - W P^T m).
        """
        weight = weight_DC.double().cpu() @ self.basis.double().T
        bias = bias_D.double().cpu() - weight @ self.mean.double()
        return weight.float(), bias.float()


def fit_whitening(prefixes: Iterable[Tensor]) -> Whitening:
    """PCA whitening of tokens, global and local together, [N, C] a video; P = V (lambda + s * mean lambda)^-1/2.

    Videos are taken until there are `SAMPLED_TOKENS`.

    Raises:
        InputError: there are no tokens.
    """
    taken: list[Tensor] = []
    for prefix_NC in prefixes:
        taken.append(prefix_NC.double())
        if sum(map(len, taken)) >= SAMPLED_TOKENS:
            break
    if not taken:
        raise InputError("whitening needs stored tokens to be made of, and there are none.")
    tokens_NC = torch.cat(taken)
    mean_C = tokens_NC.mean(dim=0)
    centred_NC = tokens_NC - mean_C
    values_C, vectors_CC = torch.linalg.eigh(centred_NC.T @ centred_NC / max(len(tokens_NC) - 1, 1))
    values_C = values_C.clamp(min=0)
    scale = values_C.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return Whitening(mean_C.float(), (vectors_CC * (values_C + SHRINKAGE * scale).rsqrt()).float())


def reinitialise(linear: nn.Linear, embedding: Tensor, seed: int) -> None:
    """Draw weights for a linear layer over whitened tokens, its outputs spread as the rows of an embedding are."""
    generator = torch.Generator().manual_seed(seed)
    std = float(embedding.detach().float().std()) / linear.in_features**0.5
    drawn = torch.randn(linear.weight.shape, generator=generator) * std
    with torch.no_grad():
        linear.weight.copy_(drawn)
        linear.bias.zero_()
