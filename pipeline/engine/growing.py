"""The answers that a batch's rows are making, kept on the device: a step takes and gives no number of any one row.

Shape letters: R rows, X new tokens that the roomiest row may have, E tokens that end an answer.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from longvlm.pipeline.transfer import Fetch, tensor_on


class Growing:
    """New tokens of each row. A row is open until a token ends it, its room is full or its logits overflow."""

    def __init__(self, suffixes: Sequence[int], rooms: Sequence[int], drawn: Tensor | None, ends_E: Tensor) -> None:
        """Rows without new tokens.

        Args:
            suffixes: how long each row's suffix is: its tail goes on from there.
            rooms: how many new tokens each may have.
            drawn: [R, X] random numbers for them, if they are sampled.
            ends_E: ids that end an answer.
        """
        device = ends_E.device
        self._ends_E, self._drawn_RX = ends_E, drawn
        self._room_R, self.at_R = tensor_on(device, [rooms, [length - 1 for length in suffixes]])
        self._count_R, self.newest_R = self._room_R.new_zeros(2, len(rooms))
        # the last column takes what belongs to no row any more
        self._ids_RX = self._room_R.new_zeros(len(rooms), max(rooms) + 1)
        self.is_open_R = torch.ones_like(self._room_R, dtype=torch.bool)
        self._overflowed_R = ~self.is_open_R

    @property
    def drawn(self) -> Tensor | None:
        """The random numbers of the next tokens, [R]; None where nothing is sampled."""
        if self._drawn_RX is None:
            return None
        last = self._drawn_RX.shape[1] - 1
        return self._drawn_RX.gather(1, self._count_R.clamp(max=last)[:, None])[:, 0]

    def extend(self, chosen_R: Tensor) -> None:
        """Give every open row its next token; -1 says that its logits overflowed.

        `newest_R` are the tokens that go into the next pass and `at_R` where in their tails they stand. Closed rows
        repeat themselves there, which changes nothing.
        """
        gets_R = self.is_open_R & (chosen_R >= 0)
        self._overflowed_R |= self.is_open_R & (chosen_R < 0)
        column_R = self._count_R.where(gets_R, self._ids_RX.shape[1] - 1)
        self._ids_RX.scatter_(1, column_R[:, None], chosen_R[:, None])
        self._count_R += gets_R
        self.is_open_R.copy_(gets_R & ~self._ends(chosen_R) & (self._count_R < self._room_R))
        self.newest_R.copy_(chosen_R.where(self.is_open_R, self.newest_R))
        self.at_R += self.is_open_R

    def _ends(self, chosen_R: Tensor) -> Tensor:
        """Which tokens end an answer; `torch.isin` would wait for the device where there are many that do."""
        return (chosen_R[:, None] == self._ends_E).any(dim=1)

    def count_open(self) -> int:
        """How many rows are open: the one thing of a step that the host waits for."""
        return int(self.is_open_R.sum())

    def fetch(self) -> tuple[list[list[int]], list[bool], list[bool]]:
        """The new tokens of each row, whether it is open, and whether it overflowed."""
        ids, counts, is_open, overflowed = Fetch(self._ids_RX, self._count_R, self.is_open_R, self._overflowed_R).wait()
        new = [row[:count] for row, count in zip(ids.tolist(), counts.tolist(), strict=True)]
        return new, is_open.tolist(), overflowed.tolist()

    def keep(self, rows_R: Tensor) -> None:
        """Keep some of the rows, in this order."""
        for name in self._by_row():
            setattr(self, name, getattr(self, name)[rows_R])

    def append(self, other: "Growing") -> None:
        """Take in the rows of another."""
        widths = [one._ids_RX.shape[1] for one in (self, other)]  # noqa: SLF001 - one of its kind
        for one, width in zip((self, other), widths, strict=True):
            more = max(widths) - width
            one._ids_RX = pad(one._ids_RX, (0, more))  # noqa: SLF001
            if one._drawn_RX is not None:  # noqa: SLF001
                one._drawn_RX = pad(one._drawn_RX, (0, more))  # noqa: SLF001
        for name in self._by_row():
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def _by_row(self) -> list[str]:
        return [name for name, value in vars(self).items() if name.endswith(("_R", "_RX")) and value is not None]
