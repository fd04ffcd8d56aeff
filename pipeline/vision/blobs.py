"""Blobs of an Arrow column as tensors over the very same bytes: a value taken out of a column is a copy of it."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from torch import Tensor
from torch.utils.dlpack import from_dlpack


def buffers(column: pa.ChunkedArray) -> Iterator[pa.Buffer | None]:
    """The bytes of each value of a (large) binary column, where they lie; None for null."""
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        offset_type = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        bounds = np.frombuffer(offsets, offset_type)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        for i, valid in enumerate(chunk.is_valid().to_pylist()):
            yield data.slice(bounds[i], bounds[i + 1] - bounds[i]) if valid else None


def as_tensor(buffer: pa.Buffer, kind: pa.DataType, shape: tuple[int, ...]) -> Tensor:
    """A buffer as a tensor of a shape, whose first side may be -1: as many rows as there are bytes for.

    Raises:
        ValueError: the bytes are too few or too many.
    """
    item_bytes = kind.bit_width // 8
    row_bytes = item_bytes * int(np.prod(shape[1:]))
    rows = shape[0] if shape[0] >= 0 else buffer.size // row_bytes
    if rows * row_bytes != buffer.size or not buffer.size:
        raise ValueError(f"{buffer.size} bytes are not {list(shape)} of {kind}")
    values = pa.Array.from_buffers(kind, buffer.size // item_bytes, [None, buffer])
    return from_dlpack(values).view(rows, *shape[1:])
