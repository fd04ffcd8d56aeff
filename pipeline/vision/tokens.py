"""Stored tokens: a segment's, as rows hold them, and a video's, as a language model is given them.

Shape letters: S segments, K kept tokens of a segment, N of all segments, D channels, G global layers.
"""

# ruff: noqa: N806 - tensors are named by their shape

import math
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longvlm.pipeline.vision.blobs import as_tensor, bounds
from longvlm.schemas.errors import ErrorCode, TerminalError

MAX_FLOAT16 = 65504.0
MAX_UINT16 = 65535
_FLOAT16 = "float16"
_INF_BITS, _SIGN_BIT = 0x7C00, 0x8000


@dataclass(frozen=True, eq=False, repr=False)
class SegmentTokens:
    """The tokens of one segment."""

    segment: int
    num_frames: int
    local: Tensor  # [K, D]
    sizes: Tensor  # [K]: patch tokens merged into each
    spans: Tensor  # [K, 2]: first and last frame number each draws on, inclusive
    cls: Tensor | None  # [G, D]: mean over the segment's frames, per layer; None without a CLS token
    positions: Tensor | None = None  # [K, 3] float64: seconds into the video, row and column; None where none are kept

    def __post_init__(self) -> None:
        """Shapes agree, and there is a token and a frame. That numbers are numbers is seen to where they are stored."""
        num_tokens, dim = self.local.shape
        if not num_tokens:
            raise ValueError(f"a segment has at least one token: {self}")
        if self.sizes.shape != (num_tokens,) or self.spans.shape != (num_tokens, 2):
            raise ValueError(f"tokens, sizes and spans do not fit together: {self}")
        if self.positions is not None and self.positions.shape != (num_tokens, 3):
            raise ValueError(f"tokens and positions do not fit together: {self}")
        if self.cls is not None and self.cls.shape[1:] != (dim,):
            raise ValueError(f"local and global tokens have different widths: {self}")
        if self.num_frames < 1:
            raise ValueError(f"a segment has at least one frame: {self}")

    def __repr__(self) -> str:
        cls = None if self.cls is None else tuple(self.cls.shape)
        return f"SegmentTokens({self.segment}, local={tuple(self.local.shape)}, cls={cls}, frames={self.num_frames})"

    def to_row(self) -> dict[str, Any]:
        """The columns of `tokens` that hold it (longvlm.schemas.tables.TOKENS).

        Raises:
            ValueError: a value is not finite.
            OverflowError: a value is too large for the stored types.
        """
        if not all(torch.isfinite(part).all() for part in (self.local, self.cls) if part is not None):
            raise ValueError(f"some values are not finite: {self}")
        largest = max(part.abs().max().item() for part in (self.local, self.cls) if part is not None)
        if largest > MAX_FLOAT16:
            raise OverflowError(f"a value of {largest:.0f} does not fit into float16, in which tokens are stored")
        if self.sizes.max().item() > MAX_UINT16:
            raise OverflowError(f"a token stands for {self.sizes.max().item()} patches; at most {MAX_UINT16} fit")
        num_tokens, dim = self.local.shape
        return {
            "segment": self.segment,
            "num_frames": self.num_frames,
            "num_tokens": num_tokens,
            "dim": dim,
            "dtype": _FLOAT16,
            "local": self.local.numpy().astype("<f2").tobytes(),
            "sizes": self.sizes.numpy().astype("<u2").tobytes(),
            "spans": self.spans.numpy().astype("<u4").tobytes(),
            "cls": None if self.cls is None else self.cls.numpy().astype("<f2").tobytes(),
            "positions": None if self.positions is None else self.positions.numpy().astype("<f8").tobytes(),
        }


@dataclass(frozen=True, eq=False, repr=False)
class VideoTokens:
    """The tokens of a video, or of what a budget leaves of it, in time order."""

    local: Tensor  # [N, D]: float16 as stored, float32 once merged further
    sizes: Tensor  # [N]: patch tokens merged into each
    spans: Tensor  # [N, 2]: first and last frame number each draws on, inclusive
    counts: tuple[int, ...]  # S: how many of the N tokens each segment has
    num_frames: tuple[int, ...]  # S
    global_tokens: Tensor  # [G, D] float32: CLS, mean over all frames of the video, per layer; G may be 0
    positions: Tensor | None = None  # [N, 3] float64: seconds into the video, row, column; means over what was merged

    def __post_init__(self) -> None:
        """All parts speak of the same tokens, and every segment has one."""
        num_tokens, dim = self.local.shape
        if self.sizes.shape != (num_tokens,) or self.spans.shape != (num_tokens, 2):
            raise ValueError(f"tokens, sizes and spans do not fit together: {self}")
        if self.positions is not None and self.positions.shape != (num_tokens, 3):
            raise ValueError(f"tokens and positions do not fit together: {self}")
        if sum(self.counts) != num_tokens or len(self.counts) != len(self.num_frames):
            raise ValueError(f"tokens and segments do not fit together: {self}")
        if not self.counts or min(self.counts) < 1 or min(self.num_frames) < 1:
            raise ValueError(f"there is at least one segment, and each has at least one token and one frame: {self}")
        if self.global_tokens.shape[1] != dim:
            raise ValueError(f"local and global tokens have different widths: {self}")

    def __repr__(self) -> str:
        shapes = f"local={list(self.local.shape)}, global={list(self.global_tokens.shape)}"
        return f"VideoTokens({len(self.counts)} segments, {shapes})"

    @property
    def dim(self) -> int:
        """Channels of every token."""
        return self.local.shape[1]

    @property
    def num_global_tokens(self) -> int:
        """Rows at the head of the prefix; 0 where the tower has no CLS token."""
        return len(self.global_tokens)

    @property
    def num_whole_frames(self) -> int | None:
        """Of how many frames the local tokens are the untouched patches; None once any were merged."""
        return sum(self.num_frames) if bool((self.sizes == 1).all()) else None

    def prefix(self, *, with_global: bool = True) -> Tensor:
        """What a projector is given: [G + N, D], global tokens first, then local ones in time order.

        Without global tokens, for projectors that never saw CLS, [N, D]. This is the one copy of the stored tokens, and
        never a view of them. It is float16 as they are, or float32 once they were merged further: a projector converts
        to its own type anyway, where it lies.
        """
        num_global = self.num_global_tokens if with_global else 0
        prefix_ND = torch.empty(num_global + len(self.local), self.dim, dtype=self.local.dtype)
        prefix_ND[:num_global] = self.global_tokens[:num_global]
        prefix_ND[num_global:] = self.local
        return prefix_ND


def from_arrow(rows: pa.Table) -> VideoTokens:
    """The tokens of one video from rows of `tokens`, in any order; blobs that lie in one Arrow chunk are not copied.

    Raises:
        TerminalError: (bad_tokens) the rows do not hold what they say, or not the tokens of one video.
    """
    writes = set(rows["write_id"].to_pylist())
    if len(writes) > 1:
        raise TerminalError(ErrorCode.BAD_TOKENS, f"the tokens given belong to {len(writes)} writes, not to one.")
    try:
        return _joined([_part(batch) for batch in _in_order(rows).to_batches()])
    except ValueError as error:
        raise TerminalError(
            ErrorCode.BAD_TOKENS, f"the stored tokens cannot be used: {error}; index the video again."
        ) from error


_KINDS = {
    "local": pa.float16(),
    "sizes": pa.uint16(),
    "spans": pa.uint32(),
    "cls": pa.float16(),
    "positions": pa.float64(),
}


def _in_order(rows: pa.Table) -> pa.Table:
    order = rows["segment"].to_pylist()
    if not order or len(set(order)) < len(order):
        raise ValueError(f"there is not one row for each segment, but rows for {sorted(order)}")
    return rows if order == sorted(order) else rows.sort_by("segment")


def _part(batch: pa.RecordBatch) -> VideoTokens:
    """Whole columns are viewed, not single blobs: a video may have hundreds of segments, and a store millions.

    Facts of segments are looked at as Python's numbers, which for the dozen of a usual video is faster than arrays.
    """
    dims, dtypes, counts, frames = (batch[name].to_pylist() for name in ("dim", "dtype", "num_tokens", "num_frames"))
    if unknown := set(dtypes) - {_FLOAT16}:
        raise ValueError(f"they are stored as {', '.join(map(str, unknown))}, and only {_FLOAT16} is known")
    if len(set(dims)) > 1:
        raise ValueError(f"segments have different widths: {dims}")
    if min(frames) < 1:
        raise ValueError("a segment has at least one frame")
    dim, num_frames = dims[0], sum(frames)
    local_ND = _view(batch, "local", counts, dim)
    if not _all_finite(local_ND):
        raise ValueError("some values in local are not finite")
    global_GD = torch.empty(0, dim)
    if batch["cls"].null_count < len(counts):
        num_layers = len(batch["cls"][0].as_buffer() or b"") // (2 * dim)
        cls_ED = _view(batch, "cls", [num_layers] * len(counts), dim).float()
        # the mean over all frames (LONGVLM.md, sections 3 and 5)
        weights_S = torch.tensor([number / num_frames for number in frames])
        global_GD = (weights_S @ cls_ED.view(len(counts), -1)).view(num_layers, dim)
        if not math.isfinite(global_GD.sum().item()):
            raise ValueError("some values in cls are not finite")
    return VideoTokens(
        local_ND,
        _view(batch, "sizes", counts, 1).long().view(-1),
        _view(batch, "spans", counts, 2).long(),
        tuple(counts),
        tuple(frames),
        global_GD,
        _positions(batch, counts),
    )


def _positions(batch: pa.RecordBatch, counts: list[int]) -> Tensor | None:
    """Where tokens lie, if that is stored: rows of versions that knew none have no such column."""
    if "positions" not in batch.schema.names or batch["positions"].null_count == len(counts):
        return None
    positions_N3 = _view(batch, "positions", counts, 3)
    if not bool(positions_N3.isfinite().all()):
        raise ValueError("some values in positions are not finite")
    return positions_N3


def _view(batch: pa.RecordBatch, name: str, counts: list[int], width: int) -> Tensor:
    """All blobs of a column as one tensor [sum of counts, width] over their very bytes."""
    kind, column = _KINDS[name], batch[name]
    row_bytes = width * kind.bit_width // 8
    if column.null_count:
        raise ValueError(f"segment {batch['segment'][column.is_null().index(value=True).as_py()]} lacks {name}")
    ends = bounds(column).tolist()
    if ends != list(accumulate((count * row_bytes for count in counts), initial=ends[0])) or not all(counts):
        lengths = [end - start for start, end in pairwise(ends)]
        segment, length, count = next(
            (segment, length, count)
            for segment, length, count in zip(batch["segment"].to_pylist(), lengths, counts, strict=True)
            if length != count * row_bytes or not length
        )
        raise ValueError(f"{name} of segment {segment}: {length} bytes are not {[count, width]} of {kind}")
    return as_tensor(column.buffers()[2].slice(ends[0], ends[-1] - ends[0]), kind, (-1, width))


def _joined(parts: list[VideoTokens]) -> VideoTokens:
    """One video of its consecutive parts."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.dim, part.num_global_tokens) for part in parts}) > 1:
        raise ValueError("segments have different widths or global layers")
    positions = [part.positions for part in parts if part.positions is not None]
    if len(positions) not in (0, len(parts)):
        raise ValueError("some segments have positions and others none")
    frames_E = torch.tensor([sum(part.num_frames) for part in parts], dtype=torch.float32)
    global_EGD = torch.stack([part.global_tokens for part in parts])
    return VideoTokens(
        torch.cat([part.local for part in parts]),
        torch.cat([part.sizes for part in parts]),
        torch.cat([part.spans for part in parts]),
        tuple(chain.from_iterable(part.counts for part in parts)),
        tuple(chain.from_iterable(part.num_frames for part in parts)),
        torch.tensordot(frames_E / frames_E.sum(), global_EGD, dims=1),
        torch.cat(positions) if positions else None,
    )


def _all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity among float16 values, by their bits (IEEE 754: all exponent bits set).

    Those are the largest patterns of either sign, so two maxima of integers tell, fifteen times as fast as asking each
    value, which would take longer than all else that reading does.
    """
    bits = values.numpy().view(np.uint16)
    return bool(bits.view(np.int16).max() < _INF_BITS and bits.max() < _INF_BITS | _SIGN_BIT)
