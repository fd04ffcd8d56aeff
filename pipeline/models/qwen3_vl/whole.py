"""A whole Qwen3-VL as transformers loads and runs it: its own tower over frames.

Shape letters: F frames, T tokens of a prompt.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.models.checkpoints import end_marks, load_with_tower
from longvlm.pipeline.models.contract import View, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.qwen3_vl.checkpoint import TIME_TOKENS, find_qwen
from longvlm.pipeline.models.qwen3_vl.model import time_blocks
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.pipeline.vision.towers.qwen3_vl import patchify
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec


class WholeQwen:
    """A Qwen3-VL with its tower, see `WholeModel`.

    Raises:
        InputError: the checkpoint is not one that can be answered with (see `find_qwen`).
    """

    def __init__(self, model: str, precision: Precision, device: str) -> None:
        checkpoint = find_qwen(model)
        self.words, self._config = checkpoint.prompt(), checkpoint.config
        tokenizer, text = self.words.tokenizer, self._config.text_config
        eos_ids = end_marks(model, checkpoint.folder, text, tokenizer)
        self.vocabulary = Vocabulary(tokenizer.backend_tokenizer, eos_ids)
        self.banned_ids = (*sorted(self.words.marks), *range(self.words.num_ids, text.vocab_size))
        llm = load_with_tower(model, checkpoint.folder, checkpoint.config, getattr(torch, precision))
        self.llm: Any = llm.to(device).eval()
        self._normalisation = Normalisation.from_folder(checkpoint.folder)

    def most_pictures(self, num_rows: int, tower: TowerSpec) -> int:
        """See `WholeModel.most_pictures`."""
        return num_rows // (tower.num_patches + TIME_TOKENS)

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
        config = self._config
        ids = text_and_places(time_blocks(self.words, config, prefix), config.video_token_id)
        pixels = self._normalisation.apply(frames, self.llm.device, self.llm.dtype)
        patches = patchify(pixels, config.vision_config)
        side, (_, _, height, width) = config.vision_config.patch_size, pixels.shape
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

        return View(ids, inputs)
