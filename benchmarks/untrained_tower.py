"""A small CLIP with random weights, made on the spot: for the demo, never for real videos."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast
from transformers.utils import logging

DIM = 64
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LAYERS = {"intermediate_size": 2 * DIM, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": DIM}


def build_untrained_tower(path: Path, *, image_size: int = 56, seed: int = 0) -> None:
    """Write a whole CLIP (tower, text encoder, tokenizer, processor) of 0.3 million random weights into a folder.

    Args:
        path: folder to make; its files are replaced.
        image_size: of the tower's input in pixels, a multiple of its 14 px patches.
        seed: of the weights.
    """
    logging.disable_progress_bar()
    tokenizer = _byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**_LAYERS, **ids, "vocab_size": len(tokenizer)},
        vision_config={**_LAYERS, "image_size": image_size, "patch_size": 14},
        projection_dim=DIM // 2,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    side = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side).save_pretrained(path)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, so that any text can be searched for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # the spare id keeps the end mark from being 2, for which transformers pools texts as very old CLIPs did
    special = ["<pad>", "<spare>", _START, _END]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [(token, backend.token_to_id(token)) for token in (_START, _END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=marks)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), ("<pad>", _START, _END), strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=77, **named)
