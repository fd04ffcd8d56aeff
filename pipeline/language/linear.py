"""Linear layers for the few tokens of a decoding step on a CPU.

oneDNN reads a bfloat16 weight matrix a tenth to a third faster as the left factor of a product with few columns than
as the right factor of one with few rows; with one token, and from about 32 on, there is nothing to gain, and later the
other way is faster (`benchmarks.linear`).
"""

import torch
from torch import Tensor, nn

FEW = range(2, 17)  # tokens


class FewTokensLinear(nn.Linear):
    """A linear layer over the weights of another, quick for few tokens."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None, device="meta")
        self.weight, self.bias = of.weight, of.bias

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name it has in nn.Linear
        """[..., in] -> [..., out]."""
        rows = input.flatten(0, -2)
        if len(rows) not in FEW:
            return super().forward(input)
        columns = self.weight @ rows.T
        if self.bias is not None:
            columns += self.bias[:, None]
        return columns.T.contiguous().view(*input.shape[:-1], -1)


def quicken(llm: nn.Module) -> None:
    """Put these layers in place of a model's own, if it runs on a CPU in bfloat16."""
    for name, module in list(llm.named_modules()):
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16:
            llm.set_submodule(name, FewTokensLinear(module))
