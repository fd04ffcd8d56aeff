"""A whole SmolVLM2 as transformers runs it: its own tower and connector over frames.

Shape letters: T tokens of a prompt.
"""

# ruff: noqa: N803 - tensors are named by their shape

import torch
from torch import Tensor

from longvlm.pipeline.models.contract import View
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.models.smolvlm.model import time_blocks
from longvlm.pipeline.models.timed_whole import WholeTimed


class WholeSmol(WholeTimed):
    """A SmolVLM2 with its tower."""

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
        pixels = self.pixels(frames)[None]

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:  # noqa: ARG001 - placeholders mark the place
            return {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None], "pixel_values": pixels}

        return View(text_and_places(time_blocks(self.words, prefix), self.config.image_token_id), inputs)
