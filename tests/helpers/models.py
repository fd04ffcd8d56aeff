"""Small random towers and vision-language models on disk, as transformers saves real ones, with all their files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logging.disable_progress_bar()
# As text, with all defaults taken off, transformers makes of each config what no log shows and no message says: it took
# a quarter of the time of tests of checkpoints.
PreTrainedConfig.__repr__ = object.__repr__

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def save_clip_tower(path, *, image_size=56, patch=14, hidden=64, layers=4, heads=4, text=True, seed=0) -> Path:
    """A CLIPModel (with a text part and tokenizer), or a CLIPVisionModel alone; the same seed gives the same tower."""
    vision = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch,
    }
    torch.manual_seed(seed)
    tower = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    if text:
        tokenizer = byte_tokenizer(start="<|startoftext|>", end="<|endoftext|>", max_length=77)
        words = _text_config(tokenizer, hidden, layers, heads)
        model = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=hidden // 2)).eval()
        model.vision_model.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
        tokenizer.save_pretrained(path)
    else:
        model = tower
    size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    processor = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, **size}
    return _save(path, model, {**processor, "image_mean": CLIP_MEAN, "image_std": CLIP_STD})


def save_siglip_tower(path, *, image_size=56, patch=14, hidden=64, layers=4, heads=4, text=True, seed=0) -> Path:
    """A SiglipModel (with a text part and tokenizer), or a SiglipVisionModel alone."""
    vision = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch,
    }
    torch.manual_seed(seed)
    tower = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    if text:
        tokenizer = byte_tokenizer(start=None, end="</s>", max_length=64)
        words = _text_config(tokenizer, hidden, layers, heads)
        model = SiglipModel(SiglipConfig(text_config=words, vision_config=vision)).eval()
        model.vision_model.load_state_dict(getattr(tower, "vision_model", tower).state_dict())
        tokenizer.save_pretrained(path)
    else:
        model = tower
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": image_size, "width": image_size}}
    return _save(path, model, {**processor, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})


def byte_tokenizer(
    *, start: str | None, end: str, max_length: int, lower: bool = True, close: bool = True
) -> PreTrainedTokenizerFast:
    """Every byte a token, so that any text has ids of its own; lower-cased, ended (and started) as CLIP texts are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # one spare id, because transformers pools CLIP texts in an old way where the end token's id is 2
    special = [token for token in ("<pad>", "<unused>", start, end) if token]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ids = [(token, backend.token_to_id(token)) for token in special[2:]]
    single = [*([start] if start else []), "$A", *([end] if close else [])]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token=start, eos_token=end, model_max_length=max_length
    )


def _text_config(tokenizer, hidden, layers, heads) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": tokenizer.model_max_length,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(path, model, processor) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    common = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **processor}))
    return folder


def byte_fallback_tokenizer(pieces=("▁", *'{}[]":,. -', *"0123456789", "▁{", '":', "▁7", "12", "red")) -> Tokenizer:
    """As LLaMA's: some pieces, of which a space before a word is part, and a token for every byte that they lack."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return tokenizer


# In the words of the checkpoints that people download: LLaVA's turns, and Qwen's.
_TURNS = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'MODALITY') %}{{ '<MODALITY>\n' }}"
    "{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVAS = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, _TURNS.replace("MODALITY", "image")),
    "llava_next_video": (
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
        _TURNS.replace("MODALITY", "video"),
    ),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, _CHATML),
}
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def save_llava(path, family="llava", *, image_size=56, layers=4, seed=0, tower=None, **changes) -> Path:
    """A whole checkpoint over CLIP and LLaMA, or for OneVision over SigLIP and Qwen2.

    Args:
        path: folder to make.
        family: one of `LLAVAS`.
        image_size: of the tower; its patches are of 14 px.
        layers: of the tower.
        seed: of all weights.
        tower: a state dict of a tower's weights to put in place of random ones.
        changes: fields of the configuration.
    """
    config_class, model_class, template = LLAVAS[family]
    siglip = family == "llava_onevision"
    tokenizer = _chat_tokenizer(siglip=siglip)
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    marks = {"image_token_index": image} | ({} if family == "llava" else {"video_token_index": video})
    vision = {
        **_SIZES,
        "intermediate_size": 128,
        "image_size": image_size,
        "patch_size": 14,
        "num_hidden_layers": layers,
    }
    text = {
        **_SIZES,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer) + 5,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = config_class(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False) if siglip else CLIPVisionConfig(**vision),
        text_config=Qwen2Config(**text) if siglip else LlamaConfig(**text),
        **{**marks, **changes},
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases and line breaks at their initial values would hide mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
    if tower is not None:
        inside = model.model.vision_tower
        getattr(inside, "vision_model", inside).load_state_dict(tower)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    folder = Path(path)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (folder / "preprocessor_config.json").write_text(json.dumps(_frame_processor(image_size, siglip=siglip)))
    return folder


def _chat_tokenizer(*, siglip: bool):
    """A token a byte. LLaMA's begins every text with its mark; Qwen's marks turns and begins texts with nothing."""
    end = "<|im_end|>" if siglip else "</s>"
    tokenizer = byte_tokenizer(start=None if siglip else "<s>", end=end, max_length=4096, lower=False, close=False)
    marks = ["<|im_start|>", "<image>", "<video>"] if siglip else ["<image>", "<video>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, normalized=False) for mark in marks]})
    return tokenizer


def _frame_processor(image_size: int, *, siglip: bool) -> dict[str, object]:
    side = {"height": image_size, "width": image_size}
    if siglip:
        return {"size": side, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
    cut = {"do_center_crop": True, "crop_size": side, "size": {"shortest_edge": image_size}}
    return {**cut, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}


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
    tokenizer = _marked_tokenizer("<|im_end|>", _QWEN_MARKS)
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
    torch.manual_seed(seed)
    return _save_whole(path, Qwen3VLForConditionalGeneration(config).eval(), tokenizer, template, files)


def save_smolvlm(path, *, seed=0, tied=False, **text) -> Path:
    """A whole SmolVLM2: a SigLIP of 64 px frames in 16 px patches, four patches a token, two layers of LLaMA."""
    tokenizer = _marked_tokenizer("<end_of_utterance>", _SMOL_MARKS)
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
    torch.manual_seed(seed)
    return _save_whole(path, SmolVLMForConditionalGeneration(config).eval(), tokenizer, None, files)


_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "do_rescale": True}
_EDGES = {"shortest_edge": 1024, "longest_edge": 65536}


def _marked_tokenizer(end, marks):
    tokenizer = byte_tokenizer(start=None, end=end, max_length=262_144, lower=False, close=False)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, normalized=False) for mark in marks]})
    return tokenizer


def _save_whole(path, model, tokenizer, template, files) -> Path:
    """In shards, its matrices redrawn with a spread at which answers differ; real ones ask for sampling."""
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


def script(folder, cue, said, *, special=False, spare="<|vision_pad|>") -> Path:
    """Have a checkpoint write given tokens after the last one of its prompts, and then its end mark.

    Each of them follows from the one before alone, so none may come twice.

    Args:
        folder: with weights that are not tied.
        cue: what prompts end in, a character.
        said: characters, or marks of thinking.
        special: whether the mark that closes thinking is special to the tokenizer.
        spare: the special token that becomes this mark.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace('"<unused>"', '"<think>"')
        content = json.loads(text.replace(f'"{spare}"', '"</think>"'))
        for token in content.get("added_tokens", ()):
            token["special"] &= special or token["content"] != "</think>"
        if not special:
            content.pop("extra_special_tokens", None)
        (folder / name).write_text(json.dumps(content))
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForImageTextToText))
    embed, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    ids = [tokenizer.backend_tokenizer.token_to_id("Ċ" if text == "\n" else text) for text in (cue, *said)]
    head.zero_()
    for place, (before, after) in enumerate(zip(ids, [*ids[1:], tokenizer.eos_token_id], strict=True)):
        embed[before] = torch.eye(embed.shape[1])[place] * embed.shape[1] ** 0.5
        head[after] = embed[before]
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
        elif "norm" in name:
            parameter.data.fill_(1)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    for path in folder.glob("model*"):
        path.unlink()
    model.save_pretrained(folder)
    return folder
