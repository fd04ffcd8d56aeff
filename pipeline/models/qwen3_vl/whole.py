"""A whole Qwen3-VL as transformers runs it: its own tower over frames.

Shape letters: T tokens of a prompt.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import torch
from torch import Tensor

from longvlm.pipeline.models.contract import View
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.qwen3_vl.model import time_blocks
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.models.timed_whole import WholeTimed
from longvlm.pipeline.vision.towers.qwen3_vl import patchify


class WholeQwen(WholeTimed):
    """A Qwen3-VL with its tower."""

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
        config = self.config
        patches = patchify(self.pixels(frames), config.vision_config)
        side, (_, height, width, _) = config.vision_config.patch_size, frames.shape
        grid = torch.tensor([[len(patches), height // side, width // side]], device=self.llm.device)

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:  # noqa: ARG001 - placeholders mark the place
            is_video_T = (ids_T == config.video_token_id)[None]
            return {
                "input_ids": ids_T[None],
                "attention_mask": torch.ones_like(ids_T)[None],
                "pixel_values_videos": patches.flatten(0, 1),
                "video_grid_thw": grid,
                "mm_token_type_ids": is_video_T.int() * 2,  # without them it answers something else, and says nothing
            }

        return View(text_and_places(time_blocks(self.words, config, prefix), config.video_token_id), inputs)
