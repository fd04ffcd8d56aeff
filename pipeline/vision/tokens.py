"""Stored tokens: a segment's, as rows hold them, and a video's, as a language model is given them.

Shape letters: S segments, K kept tokens of a segment, D channels, G global layers.
"""

# ruff: noqa: N806 - tensors are named by their shape

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.vision.blobs import as_tensor, buffers
from schemas.errors import ErrorCode, TerminalError

MAX_FLOAT16 = 65504.0
MAX_UINT16 = 65535
_FLOAT16 = "float16"


@dataclass(frozen=True, eq=False, repr=False)
class SegmentTokens:
    """The tokens of one segment."""

    segment: int
    num_frames: int
    local: Tensor  # [K, D]
    sizes: Tensor  # [K]: patch tokens merged into each
    spans: Tensor  # [K, 2]: first and last frame number each draws on, inclusive
    cls: Tensor | None  # [G, D]: mean over the segment's frames, per layer; None without a CLS token

    def __post_init__(self) -> None:
        """Shapes agree, there is a frame, and every number is one."""
        num_tokens, dim = self.local.shape
        if not num_tokens:
            raise ValueError(f"a segment has at least one token: {self}")
        if self.sizes.shape != (num_tokens,) or self.spans.shape != (num_tokens, 2):
            raise ValueError(f"tokens, sizes and spans do not fit together: {self}")
        if self.cls is not None and self.cls.shape[1:] != (dim,):
            raise ValueError(f"local and global tokens have different widths: {self}")
        if self.num_frames < 1:
            raise ValueError(f"a segment has at least one frame: {self}")
        if not all(torch.isfinite(part).all() for part in (self.local, self.cls) if part is not None):
            raise ValueError(f"some values are not finite: {self}")

    def __repr__(self) -> str:
        cls = None if self.cls is None else tuple(self.cls.shape)
        return f"SegmentTokens({self.segment}, local={tuple(self.local.shape)}, cls={cls}, frames={self.num_frames})"

    def to_row(self) -> dict[str, Any]:
        """The columns of `tokens` that hold it (schemas.tables.TOKENS).

        Raises:
            OverflowError: a value is too large for the stored types.
        """
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
        }


@dataclass(frozen=True, eq=False, repr=False)
class VideoTokens:
    """The tokens of a video or of consecutive parts of it, segments in time order."""

    segments: tuple[SegmentTokens, ...]

    def __post_init__(self) -> None:
        """Segments follow each other and have the same width and global layers."""
        if not self.segments:
            raise ValueError("a video has at least one segment")
        order = [part.segment for part in self.segments]
        if order != sorted(set(order)):
            raise ValueError(f"segments are not in time order, each once: {order}")
        kinds = {(part.local.shape[1], None if part.cls is None else part.cls.shape[0]) for part in self.segments}
        if len(kinds) > 1:
            raise ValueError(f"segments have different widths or global layers: {self.segments}")

    def __repr__(self) -> str:
        first, num_tokens = self.segments[0], sum(len(part.local) for part in self.segments)
        cls = None if first.cls is None else first.cls.shape[0]
        return f"VideoTokens({len(self.segments)} segments, local=[{num_tokens}, {self.dim}], global={cls})"

    @property
    def dim(self) -> int:
        """Channels of every token."""
        return self.segments[0].local.shape[1]

    @property
    def num_global_tokens(self) -> int:
        """Rows at the head of the prefix; 0 where the tower has no CLS token."""
        cls = self.segments[0].cls
        return 0 if cls is None else cls.shape[0]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First and one past the last row of each segment in the prefix."""
        ends = list(accumulate((len(part.local) for part in self.segments), initial=self.num_global_tokens))
        return list(pairwise(ends))

    @property
    def num_visual_tokens(self) -> int:
        """Rows of the prefix."""
        return self.bounds[-1][1]

    def prefix(self) -> Tensor:
        """What a projector is given: float32 [G + sum K, D], global tokens first, then local ones in time order.

        The global tokens are the frame-weighted mean of the segments' own, which is the mean over all frames
        (LONGVLM.md, sections 3 and 5).
        """
        prefix_ND = torch.empty(self.num_visual_tokens, self.dim)
        num_global = self.num_global_tokens
        if num_global:
            frames_S = torch.tensor([part.num_frames for part in self.segments], dtype=torch.float32)
            cls_SGD = torch.stack([part.cls for part in self.segments if part.cls is not None]).float()
            prefix_ND[:num_global] = torch.tensordot(frames_S / frames_S.sum(), cls_SGD, dims=1)
        for part, (start, stop) in zip(self.segments, self.bounds, strict=True):
            prefix_ND[start:stop] = part.local
        return prefix_ND


def from_arrow(rows: pa.Table) -> VideoTokens:
    """The tokens of one video from rows of `tokens`, in any order, without copying their blobs.

    Raises:
        TerminalError: (bad_tokens) the rows do not hold what they say, or not the tokens of one video.
    """
    writes = {tuple(row.values()) for row in rows.select(["video_id", "recipe", "write_id"]).to_pylist()}
    if len(writes) > 1:
        raise TerminalError(ErrorCode.BAD_TOKENS, f"the tokens given belong to {len(writes)} writes, not to one.")
    facts = rows.select(["segment", "num_frames", "num_tokens", "dim", "dtype"]).to_pylist()
    blobs = zip(*(buffers(rows[name]) for name in _BLOBS), strict=True)
    try:
        parts = [_segment(fact, dict(zip(_BLOBS, blob, strict=True))) for fact, blob in zip(facts, blobs, strict=True)]
        return VideoTokens(tuple(sorted(parts, key=lambda part: part.segment)))
    except ValueError as error:
        raise TerminalError(
            ErrorCode.BAD_TOKENS, f"the stored tokens cannot be used: {error}; index the video again."
        ) from error


_BLOBS = {"local": pa.float16(), "sizes": pa.uint16(), "spans": pa.uint32(), "cls": pa.float16()}


def _segment(fact: dict[str, Any], blobs: dict[str, pa.Buffer | None]) -> SegmentTokens:
    segment, num_tokens, dim = fact["segment"], fact["num_tokens"], fact["dim"]
    if fact["dtype"] != _FLOAT16:
        raise ValueError(f"segment {segment} is stored as {fact['dtype']}, and only {_FLOAT16} is known")
    shapes = {"local": (num_tokens, dim), "sizes": (num_tokens,), "spans": (num_tokens, 2), "cls": (-1, dim)}
    parts: dict[str, Tensor] = {}
    for name, blob in blobs.items():
        if blob is not None:
            try:
                parts[name] = as_tensor(blob, _BLOBS[name], shapes[name])
            except ValueError as error:
                raise ValueError(f"{name} of segment {segment}: {error}") from error
        elif name != "cls":
            raise ValueError(f"segment {segment} lacks {name}")
    return SegmentTokens(
        segment, fact["num_frames"], parts["local"], parts["sizes"].long(), parts["spans"].long(), parts.get("cls")
    )
