import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.vision.tokens import SegmentTokens, VideoTokens, from_arrow
from schemas import tables
from schemas.errors import ErrorCode, TerminalError

DIM = 8


def segment_tokens(segment, *, num_tokens=3, num_frames=4, with_cls=True, seed=0):
    generator = torch.Generator().manual_seed(seed + segment)
    return SegmentTokens(
        segment=segment,
        num_frames=num_frames,
        local=torch.randn(num_tokens, DIM, generator=generator),
        sizes=torch.arange(1, num_tokens + 1),
        spans=torch.tensor([[10 * segment, 10 * segment + i] for i in range(num_tokens)]),
        cls=torch.randn(5, DIM, generator=generator) if with_cls else None,
    )


def stored(*parts, **changes):
    ids = {"video_id": "v", "recipe": "r", "write_id": "w"}
    return pa.Table.from_pylist([{**ids, **part.to_row(), **changes} for part in parts], schema=tables.TOKENS)


def test_tokens_come_back_from_arrow_in_time_order():
    parts = [segment_tokens(2, num_frames=1, num_tokens=2), segment_tokens(0), segment_tokens(1, num_tokens=4)]
    tokens = from_arrow(stored(*parts))
    assert [part.segment for part in tokens.segments] == [0, 1, 2]
    for part, original in zip(tokens.segments, sorted(parts, key=lambda part: part.segment), strict=True):
        torch.testing.assert_close(part.local.float(), original.local, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(part.cls.float(), original.cls, atol=2e-3, rtol=2e-3)
        assert torch.equal(part.sizes, original.sizes)
        assert torch.equal(part.spans, original.spans)
        assert part.num_frames == original.num_frames


def test_storing_again_gives_the_same_bytes():
    rows = stored(segment_tokens(0), segment_tokens(1))
    assert stored(*from_arrow(rows).segments).equals(rows)


def test_the_prefix_is_global_first_then_local_in_time_order():
    parts = [segment_tokens(0, num_frames=6), segment_tokens(1, num_tokens=5, num_frames=2)]
    prefix = VideoTokens(tuple(parts)).prefix()
    assert prefix.shape == (5 + 3 + 5, DIM)
    assert prefix.dtype == torch.float32
    torch.testing.assert_close(prefix[:5], (6 * parts[0].cls + 2 * parts[1].cls) / 8)
    assert torch.equal(prefix[5:], torch.cat([part.local for part in parts]))
    assert VideoTokens(tuple(parts)).bounds == [(5, 8), (8, 13)]


def test_without_a_cls_token_the_prefix_is_local_alone():
    tokens = from_arrow(stored(segment_tokens(3, with_cls=False), segment_tokens(4, with_cls=False)))
    assert (tokens.num_global_tokens, tokens.num_visual_tokens, tokens.prefix().shape) == (0, 6, (6, DIM))
    assert repr(tokens) == "VideoTokens(2 segments, local=[6, 8], global=None)"


def test_blobs_are_read_where_they_lie():
    rows = stored(segment_tokens(0))
    view = from_arrow(rows).segments[0].local
    assert view.data_ptr() == rows["local"].chunk(0).buffers()[2].address


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"local": b"123"}, r"local of segment 0: 3 bytes are not \[3, 8\] of halffloat"),
        ({"sizes": b""}, "sizes of segment 0: 0 bytes"),
        ({"cls": b"\0" * 17}, "cls of segment 0: 17 bytes"),
        ({"spans": None}, "segment 0 lacks spans"),
        ({"num_tokens": 4}, "local of segment 0: 48 bytes"),
        ({"local": np.full((3, DIM), np.nan, "<f2").tobytes()}, "not finite"),
        ({"cls": np.full((5, DIM), np.inf, "<f2").tobytes()}, "not finite"),
        ({"dtype": "int8"}, "stored as int8"),
        ({"segment": 7}, "not in time order, each once"),
        ({"num_frames": 0}, "at least one frame"),
        ({"num_tokens": 0, "local": b"", "sizes": b"", "spans": b""}, "0 bytes"),
    ],
)
def test_rows_that_do_not_hold_what_they_say_are_bad_tokens(changes, reason):
    with pytest.raises(TerminalError, match=reason) as caught:
        from_arrow(stored(segment_tokens(0), segment_tokens(1), **changes))
    assert caught.value.code == ErrorCode.BAD_TOKENS


def test_rows_of_several_writes_or_widths_and_no_rows_are_bad_tokens():
    one, other = stored(segment_tokens(0)), stored(segment_tokens(1), write_id="x")
    with pytest.raises(TerminalError, match="2 writes"):
        from_arrow(pa.concat_tables([one, other]))
    with pytest.raises(TerminalError, match="different widths or global layers"):
        from_arrow(stored(segment_tokens(0), segment_tokens(1, with_cls=False)))
    with pytest.raises(TerminalError, match="at least one segment"):
        from_arrow(one.slice(0, 0))


def test_values_too_large_to_store_are_refused():
    part = segment_tokens(0)
    part.local[0, 0] = 1e5
    with pytest.raises(OverflowError, match="100000 does not fit into float16"):
        part.to_row()
    part = segment_tokens(0)
    part.sizes[0] = 70_000
    with pytest.raises(OverflowError, match="stands for 70000 patches"):
        part.to_row()
