"""A SmolVLM2 checkpoint on disk: how it is asked, and its language model."""

import re
from dataclasses import dataclass
from typing import Any, Self

from longvlm.pipeline.model_folder import load_tokenizer
from longvlm.pipeline.models.timed_checkpoint import TimedCheckpoint
from longvlm.pipeline.models.timed_prompt import TimedPrompt
from longvlm.schemas.errors import InputError

MODEL_TYPE = "smolvlm"
# What transformers asks about videos with, whatever template the checkpoint has for stills.
BEFORE, AFTER = "<|im_start|>User: ", "\n\n{question}<end_of_utterance>\nAssistant:"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


@dataclass(frozen=True, eq=False)
class SmolCheckpoint(TimedCheckpoint):
    """A checkpoint whose config was found to be one that can be answered with."""

    family = "SmolVLM"
    config_class = "SmolVLMConfig"
    text_prefix = re.compile(r"^(?:model\.)?text_model\.(?:model\.)?")
    num_text_tokens = 24  # of `\nFrame from 1000:00:` a token a byte, and three marks

    @classmethod
    def find(cls, model: str) -> Self:
        """See `TimedCheckpoint.find`; also refused is a language model that is no LLaMA."""
        checkpoint = super().find(model)
        kind = checkpoint.config.text_config.model_type
        if kind != "llama":
            raise InputError(
                f"the language model of {model} is of type {kind}, which cannot be answered with; choose a SmolVLM2 "
                "over a LLaMA."
            )
        return checkpoint

    def build_llm(self) -> Any:
        """See `TimedCheckpoint.build_llm`."""
        from transformers import LlamaForCausalLM  # takes seconds to load

        return LlamaForCausalLM(self.config.text_config)

    def prompt(self) -> TimedPrompt:
        """How it is asked about a video.

        Raises:
            InputError: the tokenizer is missing or damaged, or lacks a mark.
        """
        tokenizer = load_tokenizer(self.folder)
        if lacking := [mark for mark in (FAKE, GLOBAL, IMAGE) if mark not in tokenizer.get_vocab()]:
            raise InputError(f"the tokenizer of {self.name} lacks {', '.join(lacking)}; copy its files again.")
        place = self.config.image_token_id

        def split(question: str) -> tuple[str, str]:
            return BEFORE, AFTER.replace("{question}", question)

        return TimedPrompt(self.name, tokenizer, split, place, frozenset({place}))
