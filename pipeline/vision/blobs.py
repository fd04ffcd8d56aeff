"""Zero-copy tensors over blobs of an Arrow column: a value taken out of a column would be a copy of it."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_INF_BITS, _SIGN_BIT = 0x7C00, 0x8000  # of float16


def buffers(column: pa.ChunkedArray) -> Iterator[pa.Buffer | None]:
    """The buffers of each value of a (large) binary column, where they lie; None for null."""
    for chunk in column.chunks:
        data, ends = chunk.buffers()[2], bounds(chunk).tolist()
        for i, valid in enumerate(chunk.is_valid().to_pylist()):
            yield data.slice(ends[i], ends[i + 1] - ends[i]) if valid else None


def bounds(values: pa.Array) -> NDArray[Any]:
    """The offsets in their buffer where values of a (large) binary array begin, and where the last one ends."""
    offset_type = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    return np.frombuffer(values.buffers()[1], offset_type)[values.offset : values.offset + len(values) + 1]


def as_tensor(buffer: pa.Buffer, kind: pa.DataType, shape: tuple[int, ...]) -> Tensor:
    """View a buffer as a tensor of a shape, whose first side may be -1: as many rows as there are bytes for.

    Raises:
        ValueError: the bytes are too few or too many.
    """
    item_bytes = kind.bit_width // 8
    row_bytes = item_bytes * math.prod(shape[1:])
    rows = shape[0] if shape[0] >= 0 else buffer.size // row_bytes
    if rows * row_bytes != buffer.size or not buffer.size:
        raise ValueError(f"{buffer.size} bytes are not {list(shape)} of {kind}")
    values = pa.Array.from_buffers(kind, buffer.size // item_bytes, [None, buffer])
    return from_dlpack(values).view(rows, *shape[1:])


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity among float16 values, by their bits (IEEE 754: all exponent bits set).

    Those are the largest patterns of either sign, so two maxima of integers tell, fifteen times as fast as asking each
    value, which would take longer than all else that reading does.
    """
    bits = values.numpy().view(np.uint16)
    return bool(bits.view(np.int16).max() < _INF_BITS and bits.max() < _INF_BITS | _SIGN_BIT)
