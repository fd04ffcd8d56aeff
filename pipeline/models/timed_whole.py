"""Whole models of the families whose prompts hold times, as transformers loads and runs them over frames."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from longvlm.pipeline.models.checkpoints import end_marks, load_with_tower
from longvlm.pipeline.models.contract import View, Vocabulary
from longvlm.pipeline.models.prefix import VideoPrefix
from longvlm.pipeline.models.timed_checkpoint import TimedCheckpoint
from longvlm.pipeline.vision.pixels import Normalisation
from longvlm.schemas.recipe import Precision
from longvlm.schemas.tower import TowerSpec


class WholeTimed(ABC):
    """A model with its tower, see `WholeModel`.

    Raises:
        InputError: the checkpoint lacks something.
    """

    def __init__(self, checkpoint: TimedCheckpoint, precision: Precision, device: str) -> None:
        self.words, self.config = checkpoint.prompt(), checkpoint.config
        tokenizer, text = self.words.tokenizer, self.config.text_config
        eos_ids = end_marks(checkpoint.name, checkpoint.folder, text, tokenizer)
        self.vocabulary = Vocabulary(tokenizer.backend_tokenizer, eos_ids)
        self.banned_ids = (*sorted(self.words.marks), *range(self.words.num_ids, text.vocab_size))
        llm = load_with_tower(checkpoint.name, checkpoint.folder, self.config, getattr(torch, precision))
        self.llm: Any = llm.to(device).eval()
        self._normalisation = Normalisation.from_folder(checkpoint.folder)
        self._num_text_tokens = checkpoint.num_text_tokens

    def most_pictures(self, num_rows: int, tower: TowerSpec) -> int:
        """See `WholeModel.most_pictures`."""
        return num_rows // (tower.num_patches + self._num_text_tokens)

    def pixels(self, frames: Tensor) -> Tensor:
        """Frames uint8 [F, height, width, 3] as its tower takes them, [F, 3, height, width]."""
        return self._normalisation.apply(frames, self.llm.device, self.llm.dtype)

    @abstractmethod
    def show(self, frames: Tensor, prefix: VideoPrefix) -> View:
        """See `WholeModel.show`."""
