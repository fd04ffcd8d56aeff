"""A LongVLM that nobody has trained yet: a LLaMA's weights with a new projector and rows for the three video tokens."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.language.checkpoint import find_checkpoint
from pipeline.language.longvlm import EMBED, HEAD, PROJECT, PROJECT_BIAS
from pipeline.language.prompt import VIDEO_TOKENS
from pipeline.language.tokenizer import load_tokenizer
from pipeline.vision.encode import describe_tower
from schemas.errors import InputError

_STD = 0.02  # LLaMA's own, for weights that are drawn


def is_begun(model: str) -> bool:
    """Whether a LongVLM has a projector already.

    Raises:
        InputError: this is no language model (see `find_checkpoint`).
    """
    checkpoint = find_checkpoint(model)
    return PROJECT in checkpoint.tensors() or checkpoint.projector is not None


def begin(model: str, folder: Path, seed: int) -> None:
    """Write a whole LongVLM over a base LLaMA whose config names a tower, with what is new drawn by a seed.

    Raises:
        InputError: the base lacks something, or its tokenizer does not fit.
    """
    checkpoint = find_checkpoint(model)
    tensors, tokenizer = checkpoint.tensors(), load_tokenizer(checkpoint.tokenizer)
    width = describe_tower(checkpoint.tower).dim
    generator = torch.Generator().manual_seed(seed)
    if EMBED not in tensors:
        raise InputError(f"the weights of {model} lack {EMBED}; copy the checkpoint again.")
    if tokenizer.get_vocab_size() == len(tensors[EMBED]) + len(VIDEO_TOKENS):
        for name in {EMBED, HEAD} & set(tensors):
            tensors[name] = with_video_rows(tensors[name], generator)
    bound = width**-0.5  # of torch's own linear layers
    hidden = tensors[EMBED].shape[1]
    for name, shape in ((PROJECT, (hidden, width)), (PROJECT_BIAS, (hidden,))):
        tensors[name] = nn.init.uniform_(torch.empty(shape), -bound, bound, generator).to(tensors[EMBED].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    named = Path(checkpoint.config["mm_vision_tower"])
    tower = str(Path(checkpoint.tower).resolve()) if Path(checkpoint.tower).is_dir() else str(named)
    config = {**checkpoint.config, "vocab_size": len(tensors[EMBED]), "mm_hidden_size": width, "mm_vision_tower": tower}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def with_video_rows(weight_VD: Tensor, generator: torch.Generator) -> Tensor:  # noqa: N803 - named by its shape
    """Rows for the video tokens after those of the vocabulary: <vid_patch> is drawn, the marks are the mean of all.

    As the reference adds them to embedding and head (LONGVLM.md section 7).
    """
    patch = torch.randn(1, weight_VD.shape[1], generator=generator) * _STD
    rows = torch.cat([weight_VD.float(), patch])
    return torch.cat([rows, rows.mean(dim=0, keepdim=True).expand(2, -1)]).to(weight_VD.dtype)
