"""Stored tokens: a segment's, as rows hold them, and a video's, as a language model is given them.

Shape letters: S segments, K kept tokens of a segment, N of all segments, D channels, G global layers.
"""

# ruff: noqa: N803, N806 - tensors are named by their shape

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longvlm.pipeline.vision.blobs import all_finite, as_tensor, bounds
from longvlm.pipeline.vision.int8 import check, dequantise, make_scratch, num_groups, quantise
from longvlm.schemas.errors import ErrorCode, TerminalError
from longvlm.schemas.recipe import TokenDtype

MAX_FLOAT16 = 65504.0
MAX_UINT16 = 65535


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

    def to_row(self, dtype: TokenDtype = "float16") -> dict[str, Any]:
        """The columns of `tokens` that hold it (longvlm.schemas.tables.TOKENS).

        What becomes int8 is rounded to float16 first, so that a stored float16 row gives the same bytes later.

        Args:
            dtype: of the local tokens.

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
        local, scales = self.local.half(), None
        if dtype == "int8":
            local, scales = quantise(local)
        return {
            "segment": self.segment,
            "num_frames": self.num_frames,
            "num_tokens": num_tokens,
            "dim": dim,
            "dtype": dtype,
            "local": local.numpy().tobytes(),
            "scales": None if scales is None else scales.numpy().tobytes(),
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
    _prefix: Tensor | None = field(init=False, default=None)  # [G + N, D], of which `local` is the end: of int8

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
        never a view of them; of int8 `local` is a view of it. It is float16 as they are, or float32 once they were
        merged further: a projector converts to its own type anyway, where it lies.
        """
        if self._prefix is not None:
            return self._prefix if with_global else self.local
        global_GD = self.global_tokens if with_global else self.global_tokens[:0]
        return torch.cat([global_GD.to(self.local.dtype), self.local])


def from_arrow(rows: pa.Table) -> VideoTokens:
    """The tokens of one video from rows of `tokens`, in any order; float16 in one Arrow chunk is not copied.

    Raises:
        TerminalError: (bad_tokens) the rows do not hold what they say, or not the tokens of one video.
    """
    writes = set(rows["write_id"].to_pylist())
    if len(writes) > 1:
        raise TerminalError(ErrorCode.BAD_TOKENS, f"the tokens given belong to {len(writes)} writes, not to one.")
    try:
        (video,) = _by_write(_in_order(rows)).values()
    except ValueError as error:
        raise TerminalError(
            ErrorCode.BAD_TOKENS, f"the stored tokens cannot be used: {error}; index the video again."
        ) from error
    return video


def videos_from_arrow(rows: pa.Table) -> dict[str, VideoTokens | TerminalError]:
    """The tokens of several videos by write id, or why one has none, as `from_arrow` says it.

    All that lie in one Arrow chunk are looked at together: of small ones, looking takes longer than reading.

    Args:
        rows: of `tokens`, ordered by write id and segment, each once, as `read_tokens` gives them.
    """
    try:
        return dict(_by_write(rows))
    except ValueError:
        return {write_id: _or_error(rows.slice(start, end - start)) for write_id, start, end in _writes(rows)}


def _or_error(rows: pa.Table) -> VideoTokens | TerminalError:
    try:
        return from_arrow(rows)
    except TerminalError as error:
        return error


_LOCAL_KINDS = {"float16": pa.float16(), "int8": pa.int8()}


def _in_order(rows: pa.Table) -> pa.Table:
    order = rows["segment"].to_pylist()
    if not order or len(set(order)) < len(order):
        raise ValueError(f"there is not one row for each segment, but rows for {sorted(order)}")
    return rows if order == sorted(order) else rows.sort_by("segment")


def _by_write(rows: pa.Table) -> dict[str, VideoTokens]:
    """The video of each write; raises ValueError if there is anything wrong with any."""
    dtypes = set(rows["dtype"].to_pylist())
    if unknown := dtypes - _LOCAL_KINDS.keys():
        raise ValueError(f"they are stored as {', '.join(map(str, unknown))}, and only float16 and int8 are known")
    if len(dtypes) > 1:
        raise ValueError(f"segments are stored as {' and '.join(sorted(dtypes))}, and those of a video as one of them")
    parts: dict[str, list[VideoTokens]] = {}
    for batch in rows.to_batches():
        for write_id, part in _parts(batch, *dtypes):
            parts.setdefault(write_id, []).append(part)
    return {write_id: _joined(of_video) for write_id, of_video in parts.items()}


def _parts(batch: pa.RecordBatch, dtype: str) -> Iterator[tuple[str, VideoTokens]]:
    """What a batch holds of each video, by its write.

    Whole columns are viewed, not single blobs: a video may have hundreds of segments, and a store millions. Facts of
    segments are looked at as Python's numbers, which for the dozen of a usual video is faster than arrays.
    """
    dims, counts, frames = (batch[name].to_pylist() for name in ("dim", "num_tokens", "num_frames"))
    if len(set(dims)) > 1:
        raise ValueError(f"segments have different widths: {dims}")
    if min(frames) < 1:
        raise ValueError("a segment has at least one frame")
    local_ND, scales_NG = _local(batch, counts, dims[0], dtype)
    sizes_N = _whole_numbers(batch, "sizes", counts, pa.uint16(), 1).view(-1)
    spans_N2 = _whole_numbers(batch, "spans", counts, pa.uint32(), 2)
    positions_N3, cls_SGD = _positions(batch, counts), _cls(batch, dims[0])
    ends, scratch = list(accumulate(counts, initial=0)), make_scratch(dims[0])
    for write_id, start, end in _writes(batch):
        own, own_frames = slice(ends[start], ends[end]), frames[start:end]
        global_GD = _mean(cls_SGD[start:end], own_frames)
        prefix_MD, rows_ND = None, local_ND[own]
        if scales_NG is not None:
            prefix_MD = torch.empty(len(global_GD) + len(rows_ND), dims[0], dtype=torch.float16)
            prefix_MD[: len(global_GD)] = global_GD
            quantised_ND, rows_ND = rows_ND, prefix_MD[len(global_GD) :]
            dequantise(quantised_ND, scales_NG[own], rows_ND, scratch)
        of_segments = tuple(counts[start:end]), tuple(own_frames)
        positions = None if positions_N3 is None else positions_N3[own]
        video = VideoTokens(rows_ND, sizes_N[own], spans_N2[own], *of_segments, global_GD, positions)
        object.__setattr__(video, "_prefix", prefix_MD)  # not a field of its making: `replace` leaves it out
        yield write_id, video


def _writes(rows: pa.Table | pa.RecordBatch) -> list[tuple[str, int, int]]:
    """Each write of some rows, and where those of it begin and end."""
    lengths = [(write_id, len(list(run))) for write_id, run in groupby(rows["write_id"].to_pylist())]
    ends = accumulate(length for _, length in lengths)
    return [(write_id, end - length, end) for (write_id, length), end in zip(lengths, ends, strict=True)]


def _local(batch: pa.RecordBatch, counts: list[int], dim: int, dtype: str) -> tuple[Tensor, Tensor | None]:
    """[N, D] as stored, with scales [N, G] if it is int8."""
    kind = _LOCAL_KINDS[dtype]
    local_ND = as_tensor(_blobs(batch, "local", counts, dim, kind), kind, (-1, dim))
    if dtype == "int8":
        if "scales" not in batch.schema.names:
            raise ValueError("they are int8 without scales")
        width = num_groups(dim)
        scales = _blobs(batch, "scales", counts, width, pa.float16())
        scales_NG = as_tensor(scales, pa.float16(), (-1, width)).float()
        check(local_ND, scales_NG)
        return local_ND, scales_NG
    if not all_finite(local_ND):
        raise ValueError("some values in local are not finite")
    return local_ND, None


def _cls(batch: pa.RecordBatch, dim: int) -> Tensor:
    """[S, G, D] float32; G is 0 where none are stored."""
    column = batch["cls"]
    if column.null_count == len(column):
        return torch.empty(len(column), 0, dim)
    num_layers = len(column[0].as_buffer() or b"") // (2 * dim)
    blobs = _blobs(batch, "cls", [num_layers] * len(column), dim, pa.float16())
    cls_SGD = as_tensor(blobs, pa.float16(), (-1, num_layers, dim)).float()
    if not math.isfinite(cls_SGD.sum().item()):
        raise ValueError("some values in cls are not finite")
    return cls_SGD


def _mean(cls_SGD: Tensor, frames: list[int]) -> Tensor:
    """[G, D]: over all frames (LONGVLM.md, sections 3 and 5)."""
    if len(frames) == 1:
        return cls_SGD[0]
    num_frames = sum(frames)
    weights_S = torch.tensor([number / num_frames for number in frames])
    return (weights_S @ cls_SGD.flatten(1)).view(cls_SGD.shape[1:])


def _positions(batch: pa.RecordBatch, counts: list[int]) -> Tensor | None:
    """Where tokens lie, if that is stored: rows of versions that knew none have no such column."""
    if "positions" not in batch.schema.names or batch["positions"].null_count == len(counts):
        return None
    positions_N3 = as_tensor(_blobs(batch, "positions", counts, 3, pa.float64()), pa.float64(), (-1, 3))
    if not bool(positions_N3.isfinite().all()):
        raise ValueError("some values in positions are not finite")
    return positions_N3


def _whole_numbers(batch: pa.RecordBatch, name: str, counts: list[int], kind: pa.DataType, width: int) -> Tensor:
    """A column's unsigned numbers as int64 [N, width]."""
    numbers = np.frombuffer(_blobs(batch, name, counts, width, kind), kind.to_pandas_dtype())
    return torch.from_numpy(numbers.astype(np.int64)).view(-1, width)


def _blobs(batch: pa.RecordBatch, name: str, counts: list[int], width: int, kind: pa.DataType) -> pa.Buffer:
    """The very bytes of all blobs of a column, which hold [sum of counts, width] of a kind."""
    column = batch[name]
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
    return column.buffers()[2].slice(ends[0], ends[-1] - ends[0])


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
