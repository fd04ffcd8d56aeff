"""Weights: the tensors of a checkpoint read, written and put into modules of torch."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvlm.pipeline.model_folder import open_to_others, weight_files
from longvlm.pipeline.stored_tensors import StoredTensor, stored_fingerprint, unreadable
from longvlm.schemas.errors import InputError


def read_tensors(folder: Path, rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, memory-mapped, under the names that `rename` gives; those it calls None are skipped.

    Reads `model.safetensors` or its shards; pickles only where there are no safetensors, and only plain weights.

    Raises:
        InputError: the folder has no weights, or a file of them is missing or broken.
    """
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        if renamed := rename(name):
                            yield renamed, file.get_tensor(name)
            else:
                for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                    if renamed := rename(name):
                        yield renamed, tensor
        except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise unreadable(path, error) from error


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write contiguous tensors as safetensors in place of whatever is there, at once: somebody may be reading it."""
    draft = path.with_name(f".{path.name}")
    save_file(tensors, draft, metadata={"format": "pt"})
    open_to_others(draft)
    draft.replace(path)


def weights_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The `stored_fingerprint` of tensors, as they would be stored."""
    return stored_fingerprint((name, StoredTensor.of(tensor)) for name, tensor in tensors)


def build_module(model_class: Any, config: Any, tensors: dict[str, Tensor], model: str) -> Any:
    """An encoder of transformers around given tensors, without initialising weights first.

    In transformers 5.0 a CLIPVisionModel and its like hold the encoder proper as `vision_model` or `text_model`; later
    they are the encoder. It is the encoder that takes the tensors and is returned.

    Raises:
        InputError: tensors are missing or of other shapes than the configuration says.
    """
    with torch.device("meta"):
        module = model_class(config)
    module = getattr(module, "vision_model", getattr(module, "text_model", module))
    put_weights(module, tensors, model)
    embeddings = module.embeddings  # its positions are a buffer that no file carries
    embeddings.position_ids = torch.arange(
        embeddings.position_embedding.num_embeddings, device=embeddings.position_embedding.weight.device
    )[None]
    return module


def put_weights(module: Any, tensors: dict[str, Tensor], model: str) -> None:
    """Put given tensors in place of a module's weights, for inference; what else is given is left aside.

    Raises:
        InputError: tensors are missing or of other shapes than the module's.
    """
    try:
        missing, _ = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise InputError(f"the weights of {model} do not fit its config.json ({error}); copy both again.") from error
    if missing:
        raise InputError(f"the weights of {model} lack {missing[0]} ({len(missing)} missing in all); copy them again.")
    module.eval().requires_grad_(requires_grad=False)
