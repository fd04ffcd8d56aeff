"""Qwen3-VL's language model alone, as transformers' causal language models are built.

A module of its own, because what it needs takes seconds to load, and reading a config does not need it.
"""

from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLPreTrainedModel, Qwen3VLTextModel


class Qwen3VLForCausalLM(Qwen3VLPreTrainedModel, GenerationMixin):
    """The decoder with its head, without the tower."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers reads it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Qwen3VLTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
