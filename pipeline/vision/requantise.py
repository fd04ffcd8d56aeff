"""Stored float16 tokens as int8, without their video."""

# ruff: noqa: N806 - tensors are named by their shape

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from longvlm.pipeline.vision.int8 import quantise
from longvlm.pipeline.vision.tokens import from_arrow


def as_int8(rows: pa.Table) -> pa.Table:
    """Rows of `tokens` as indexing in int8 would have written them, to the byte.

    Args:
        rows: of one video, some of its segments or all, in float16.

    Raises:
        TerminalError: (bad_tokens) they do not hold what they say.
    """
    rows = rows.sort_by("segment").combine_chunks()
    tokens = from_arrow(rows)
    local_ND, scales_NG = quantise(tokens.local)
    ends = np.cumsum((0, *tokens.counts))
    columns = {
        "dtype": pa.repeat(pa.scalar("int8"), rows.num_rows),
        "local": _blobs(local_ND, ends),
        "scales": _blobs(scales_NG, ends),
    }
    for name, column in columns.items():
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return rows


def _blobs(values: Tensor, ends: NDArray[np.int64]) -> pa.Array:
    """A blob of each segment's rows of a tensor, over its very bytes."""
    row_bytes = values.shape[1] * values.itemsize
    offsets = pa.py_buffer((ends * row_bytes).astype(np.int32))
    return pa.Array.from_buffers(pa.binary(), len(ends) - 1, [None, offsets, pa.py_buffer(values.numpy())])
