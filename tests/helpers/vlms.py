"""Small random checkpoints of today's vision-language models, as transformers saves real ones."""

import json
from pathlib import Path

import torch
from models import byte_tokenizer
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.utils import logging

logging.disable_progress_bar()

# In the words of the real template, its branch for tools included.
QWEN_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif content.type == 'video' or 'video' in content %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
THINKING_TEMPLATE = QWEN_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")
_QWEN_MARKS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_SMOL_MARKS = ("<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", "<video>")


def save_qwen3_vl(path, *, seed=0, tied=True, template=QWEN_TEMPLATE, streams=3, **text) -> Path:
    """A whole Qwen3-VL: a tower of 16 px patches with deepstack streams, four layers of language."""
    tokenizer = _tokenizer("<|im_end|>", _QWEN_MARKS)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in _QWEN_MARKS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            **text,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(streams)),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    processor = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": _EDGES}
    files = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast", **processor, **_HALVES},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **processor, **_HALVES},
    }
    return _save(path, Qwen3VLForConditionalGeneration, config, tokenizer, seed, template, files)


def save_smolvlm(path, *, seed=0, tied=False, **text) -> Path:
    """A whole SmolVLM2: a SigLIP of 64 px frames in 16 px patches, four patches a token, two layers of LLaMA."""
    tokenizer = _tokenizer("<end_of_utterance>", _SMOL_MARKS)
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "tie_word_embeddings": tied,
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=tied,
    )
    longest = {"longest_edge": 64}
    processor = {"size": longest, "max_image_size": longest, "do_image_splitting": False, "resample": 1, **_HALVES}
    files = {"preprocessor_config.json": {"image_processor_type": "SmolVLMImageProcessor", **processor}}
    return _save(path, SmolVLMForConditionalGeneration, config, tokenizer, seed, None, files)


_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_rescale": True}
_EDGES = {"shortest_edge": 1024, "longest_edge": 65536}


def _tokenizer(end, marks):
    tokenizer = byte_tokenizer(start=None, end=end, max_length=262_144, lower=False, close=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, normalized=False) for mark in marks]})
    return tokenizer


def _save(path, model_class, config, tokenizer, seed, template, files) -> Path:
    """In shards, its matrices redrawn with a spread at which answers differ; real ones ask for sampling."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter) + (parameter.ndim == 1)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id]
    )
    model.save_pretrained(path, max_shard_size="200KB")
    tokenizer.save_pretrained(path)
    if template is not None:
        files = {**files, "chat_template.json": {"chat_template": template}}
    for name, content in files.items():
        (Path(path) / name).write_text(json.dumps(content))
    return Path(path)
