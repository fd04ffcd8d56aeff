"""What a vision tower is to the encode stage.

Shape letters: F frames, B pictures, P patches, D channels of a token, G global layers, E search channels.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longvlm.schemas.tower import TowerSpec


@dataclass(frozen=True, eq=False)
class Encoded:
    """The outputs of a tower: patches [B, P, D], and CLS rows [B, G, D] and embeddings [B, E] where it has them."""

    patches: Tensor  # in the tower's precision; streams side by side, the one that decides merging first
    cls: Tensor | None = None  # in the tower's precision; None without CLS or where no global layers are asked for
    embedding: Tensor | None = None  # float32, L2-normalised; None without an aligned text encoder

    def __repr__(self) -> str:
        parts = {"patches": self.patches, "cls": self.cls, "embedding": self.embedding}
        shapes = (f"{name}={None if part is None else tuple(part.shape)}" for name, part in parts.items())
        return f"Encoded({', '.join(shapes)})"


class Tower(Protocol):
    """A loaded vision tower."""

    @property
    def spec(self) -> TowerSpec:
        """What recipes know of it."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""

    def encode(self, frames: Tensor, feature_layer: int = -2, num_global_layers: int = 5) -> Encoded:
        """Encode RGB frames, uint8 [F, height, width, 3] on the CPU; each run of `frames_per_picture` is a picture.

        Each picture is looked at by itself: what else is in the batch changes nothing beyond the rounding of
        arithmetic. On a GPU this only queues the work, and does not wait for any of it.

        Args:
            frames: of the spec's size, or of any that the tower takes.
            feature_layer: which hidden state the patches come from, as an index into all L + 1 (0 or -L-1: the
                embeddings, -1: the last block's output).
            num_global_layers: of how many of the last hidden states the CLS row is kept, in ascending order.

        Raises:
            ValueError: it takes no frames of this size, or not so many.
        """
