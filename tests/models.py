"""Small random towers on disk, laid out as transformers saves real ones: config, weights, processor and tokenizer."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

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


def byte_tokenizer(*, start: str | None, end: str, max_length: int) -> PreTrainedTokenizerFast:
    """Every byte a token, so that any text has ids of its own; lower-cased, ended (and started) as CLIP texts are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # one spare id, because transformers pools CLIP texts in an old way where the end token's id is 2
    special = [token for token in ("<pad>", "<unused>", start, end) if token]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ids = [(token, backend.token_to_id(token)) for token in special[2:]]
    single = f"{start} $A {end}" if start else f"$A {end}"
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
