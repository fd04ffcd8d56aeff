"""Linear layers of a decoding engine: the weights of one or of several of a model's own, side by side.

On a CPU in bfloat16 a few tokens are the right factor of the weights instead of the left one: oneDNN then reads a
matrix a tenth to a third faster; with one token, and from about 32 on, there is nothing to gain, and later the other
way is faster (`benchmarks.linear`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW = range(2, 17)  # tokens


class Linear:
    """A linear layer, [T, in] -> [T, out]."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Side by side, in this order; several become views of what is then one matrix, so that none is held twice."""
        self.weight = _side_by_side(layers, "weight")
        self.bias = None if layers[0].bias is None else _side_by_side(layers, "bias")
        self._can_turn = self.weight.device.type == "cpu" and self.weight.dtype == torch.bfloat16

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the layers make of some tokens; never a view of anything else."""
        if not self._can_turn or len(tokens) not in FEW:
            return functional.linear(tokens, self.weight, self.bias)
        columns = self.weight @ tokens.T
        if self.bias is not None:
            columns += self.bias[:, None]
        return columns.T.contiguous()


def _side_by_side(layers: Sequence[nn.Linear], name: str) -> Tensor:
    """The weights or biases of layers in one tensor; what an earlier engine has put together is found, not copied."""
    parts: list[Tensor] = [getattr(layer, name).detach() for layer in layers]
    if len(parts) == 1:
        return parts[0]
    first, ends = parts[0], [part.data_ptr() + part.nbytes for part in parts]
    is_one = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    if is_one and [part.data_ptr() for part in parts[1:]] == ends[:-1]:
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    joined = torch.cat(parts)
    for layer, part in zip(layers, torch.split(joined, [len(part) for part in parts]), strict=True):
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    return joined
