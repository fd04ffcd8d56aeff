"""Which tokens rows with a grammar may take next: masks made on the host while the device computes the logits.

Shape letters: R rows, V vocabulary, G rows with a grammar, B words of 32 bits that hold a mask.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Mapping

import torch
from torch import Tensor

from longvlm.pipeline.engine.grammar import WORD_BITS, Spelling
from longvlm.pipeline.engine.growing import Growing
from longvlm.pipeline.transfer import tensor_on, to_device

_BIT = torch.tensor([1 << bit for bit in range(WORD_BITS)]).to(torch.int32)


class Masks:
    """The masks of some rows of a batch, which share a vocabulary; rows without a grammar have none and pay nothing."""

    def __init__(self, spellings: Mapping[int, Spelling], device: torch.device) -> None:
        """Of the rows that have a grammar, by their places; there is at least one."""
        self._by_row = spellings
        self._closed: set[int] = set()
        self._rows_G = tensor_on(device, list(spellings))
        self._bit_of_word = torch.arange(WORD_BITS, dtype=torch.int32, device=device)

    def take(self, growing: Growing) -> None:
        """Follow the tokens that open rows were given last; where one may not stand, put another in its place."""
        newest, is_open = growing.fetch_newest()
        instead = {}
        for row, spelling in self._by_row.items():
            if not is_open[row]:
                self._closed.add(row)
            elif (token := spelling.take(newest[row])) != newest[row]:
                instead[row] = token
        if instead:
            growing.replace(list(instead), list(instead.values()))

    def apply(self, logits_RV: Tensor) -> None:
        """Leave rows with a grammar what they may take, in place. What closed rows may take means nothing."""
        words_GB = to_device(self._make(), logits_RV.device)
        allowed_GV = ((words_GB[:, :, None] >> self._bit_of_word) & 1).flatten(1).bool()
        num_missing = logits_RV.shape[1] - allowed_GV.shape[1]  # of the head, for which there is no token
        allowed_GV = torch.nn.functional.pad(allowed_GV, (0, num_missing))  # or less, where the last word is not full
        logits_RV[self._rows_G] = logits_RV[self._rows_G].masked_fill(~allowed_GV, float("-inf"))

    def _make(self) -> Tensor:
        """The masks, int32 [G, B], by several threads where there are several rows."""
        from llguidance.numpy import fill_next_token_bitmask_par

        speller = next(iter(self._by_row.values())).speller
        words_GB = torch.zeros(len(self._by_row), speller.num_words, dtype=torch.int32)
        free = []
        for place, (row, spelling) in enumerate(self._by_row.items()):
            if row in self._closed:
                continue
            if (token := spelling.forced) is None:
                free.append((spelling.matcher, place))
            else:
                words_GB[place, token // WORD_BITS] = _BIT[token % WORD_BITS]
        if free:
            fill_next_token_bitmask_par(speller.executor, free, words_GB.numpy())
        return words_GB
