"""Tensors as they lie in a checkpoint's files: told apart and hashed without torch, whose loading takes seconds."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from longvlm.pipeline.model_folder import weight_files
from longvlm.schemas.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH_BYTES = 8  # of a safetensors file: how long its header is, which is JSON
# Torch's names of the types that safetensors writes otherwise.
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a file: its type by torch's name, its shape, and its bytes, mapped rather than read."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, tensor: "Tensor") -> Self:
        """A tensor of torch as it would be stored."""
        import torch

        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def stored_tensors(folder: Path, rename: Callable[[str], str | None]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a checkpoint as they are stored, under the names that `rename` gives; it skips by None.

    The same ones as `weights.read_tensors` gives. Only pickles, which are read where there are no safetensors, take
    torch to read.

    Raises:
        InputError: the folder has no weights, or a file of them is missing or broken.
    """
    for path in weight_files(folder):
        try:
            for name, tensor in _safetensors(path) if path.suffix == ".safetensors" else _pickled(path):
                if renamed := rename(name):
                    yield renamed, tensor
        except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, KeyError) as error:
            raise unreadable(path, error) from error


def _safetensors(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    with safe_open(path, framework="np"):  # checks that the header is sound and the file as long as it says
        pass
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    start = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
    header = json.loads(mapped[_LENGTH_BYTES:start].tobytes())
    header.pop("__metadata__", None)
    for name, said in header.items():
        begin, end = said["data_offsets"]
        yield name, StoredTensor(_TYPES[said["dtype"]], tuple(said["shape"]), mapped[start + begin : start + end])


def _pickled(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    import torch

    for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
        yield name, StoredTensor.of(tensor)


def unreadable(path: Path, error: Exception) -> InputError:
    """That a file of weights is broken."""
    return InputError(f"the weights in {path} cannot be read ({error}); copy the file again.")


def stored_fingerprint(tensors: Iterable[tuple[str, StoredTensor]]) -> str:
    """16 hex characters over names, types, shapes and bytes: equal for equal weights, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        digest.update(f"{name} torch.{tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.data.data)
    return digest.hexdigest()[:16]
