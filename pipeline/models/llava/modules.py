"""The modules of transformers' LLaVA family: its language models and projectors.

A module of its own, because what it needs takes seconds to load, and reading a config does not need it.
"""

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

_LANGUAGE_MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
_PROJECTORS: dict[str, Any] = {
    "llava": LlavaMultiModalProjector,
    "llava_next_video": LlavaNextVideoMultiModalProjector,
    "llava_onevision": LlavaOnevisionMultiModalProjector,
}


def build_modules(config: Any) -> tuple[Any, nn.Module]:
    """Language model and projector of a family's config, without the weights of a checkpoint."""
    text = config.text_config
    return _LANGUAGE_MODELS[text.model_type](text), _PROJECTORS[config.model_type](config)
