"""A whole SmolVLM2 as transformers loads and runs it: its own tower and connector over frames.

Shape letters: F frames, T tokens of a prompt.
"""

# ruff: noqa: N803 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.models.checkpoints import end_marks, load_with_tower
from longvlm.pipeline.models.contract import View, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.row_layout import text_and_places
from longvlm.pipeline.models.smolvlm.checkpoint import FRAME_TOKENS, find_smol
from longvlm.pipeline.models.smolvlm.model import time_blocks
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec


class WholeSmol:
    """A SmolVLM2 with its tower, see `WholeModel`.

    Raises:
        InputError: the checkpoint is not one that can be answered with (see `find_smol`).
    """

    def __init__(self, model: str, precision: Precision, device: str) -> None:
        checkpoint = find_smol(model)
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
        return num_rows // (tower.num_patches + FRAME_TOKENS)

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
        place = self._config.image_token_id
        ids = text_and_places(time_blocks(self.words, prefix), place)
        pixels = self._normalisation.apply(frames, self.llm.device, self.llm.dtype)[None]

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:  # noqa: ARG001 - placeholders mark the place
            return {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None], "pixel_values": pixels}

        return View(ids, inputs)
