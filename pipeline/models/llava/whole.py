"""A whole LLaVA as transformers loads and runs it: its own tower, projector and pooling, over frames.

Shape letters: F frames, T tokens of a prompt.
"""

# ruff: noqa: N803 - tensors are named by their shape

from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.models.checkpoints import load_with_tower
from longvlm.pipeline.models.contract import View, Vocabulary
from longvlm.pipeline.models.llava.checkpoint import find_llava
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.vision.pixels import Pixels
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec


class WholeLlava:
    """A LLaVA with its tower, see `WholeModel`.

    Raises:
        InputError: the checkpoint is not one that can be answered with (see `find_llava`).
    """

    def __init__(self, model: str, precision: Precision, device: str) -> None:
        checkpoint = find_llava(model)
        config, chat = checkpoint.config, checkpoint.chat()
        self.words = chat
        self.vocabulary = Vocabulary(chat.tokenizer.backend_tokenizer, checkpoint.eos_ids(chat))
        self.banned_ids = (*sorted(chat.marks), *range(chat.num_ids, config.text_config.vocab_size))
        llm = load_with_tower(model, checkpoint.folder, checkpoint.config, getattr(torch, precision))
        self.llm: Any = llm.to(device).eval()
        self._pixels = Pixels.from_folder(checkpoint.folder, config.vision_config.image_size)
        self._is_video = checkpoint.family.modality == "video"
        one, two = (self._count_rows(num_frames) for num_frames in (1, 2))
        self._rows_per_frame, self._rows_at_end = two - one, 2 * one - two

    def most_pictures(self, num_rows: int, tower: TowerSpec) -> int:  # noqa: ARG002 - it pools them as it likes
        """See `WholeModel.most_pictures`."""
        return max((num_rows - self._rows_at_end) // self._rows_per_frame, 0)

    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:  # noqa: ARG002 - its prompts say no times
        """See `WholeModel.show`."""
        seen = self._seen(frames)

        def inputs(ids_T: Tensor, first_patch: int) -> dict[str, Tensor]:  # noqa: ARG001 - placeholders mark the place
            return {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None], **seen}

        return View((self.words.place,) * (len(frames) * self._rows_per_frame + self._rows_at_end), inputs)

    def _seen(self, frames: Tensor) -> dict[str, Tensor]:
        pixels = self._pixels.prepare(frames, self.llm.device, self.llm.dtype)
        return {"pixel_values_videos": pixels[None]} if self._is_video else {"pixel_values": pixels}

    @torch.inference_mode()
    def _count_rows(self, num_frames: int) -> int:
        """Of a video with so many frames, asked of transformers itself: families pool and end videos differently."""
        side = self._pixels.image_size
        seen = self._seen(torch.zeros(num_frames, side, side, 3, dtype=torch.uint8))
        look = self.llm.get_video_features if self._is_video else self.llm.get_image_features
        features = look(**seen, return_dict=True).pooler_output
        return sum(len(part.flatten(0, -2)) for part in features)
