from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from longvlm.pipeline.vision.tokens import SegmentTokens, VideoTokens, from_arrow, videos_from_arrow
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError

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


def stored(*parts, as_dtype="float16", **changes):
    ids = {"video_id": "v", "recipe": "r", "write_id": "w"}
    return pa.Table.from_pylist([{**ids, **part.to_row(as_dtype), **changes} for part in parts], schema=tables.TOKENS)


def test_tokens_come_back_from_arrow_in_time_order():
    parts = [segment_tokens(2, num_frames=1, num_tokens=2), segment_tokens(0), segment_tokens(1, num_tokens=4)]
    tokens = from_arrow(stored(*parts))
    ordered = sorted(parts, key=lambda part: part.segment)
    assert (tokens.counts, tokens.num_frames) == ((3, 4, 2), (4, 4, 1))
    torch.testing.assert_close(tokens.local.float(), torch.cat([p.local for p in ordered]), atol=2e-3, rtol=2e-3)
    assert torch.equal(tokens.sizes, torch.cat([part.sizes for part in ordered]))
    assert torch.equal(tokens.spans, torch.cat([part.spans for part in ordered]))


def test_the_prefix_is_global_first_then_local_in_time_order():
    parts = [segment_tokens(0, num_frames=6), segment_tokens(1, num_tokens=5, num_frames=2)]
    tokens = from_arrow(stored(*parts))
    prefix = tokens.prefix()
    assert prefix.shape == (5 + 3 + 5, DIM)
    assert prefix.dtype == torch.float16
    mean = (6 * parts[0].cls.half().float() + 2 * parts[1].cls.half().float()) / 8
    torch.testing.assert_close(prefix[:5], mean.half())
    assert torch.equal(prefix[5:], torch.cat([part.local for part in parts]).half())
    assert torch.equal(tokens.prefix(with_global=False), prefix[5:])
    assert repr(tokens) == "VideoTokens(2 segments, local=[8, 8], global=[5, 8])"


def test_without_a_cls_token_the_prefix_is_local_alone():
    tokens = from_arrow(stored(segment_tokens(3, with_cls=False), segment_tokens(4, with_cls=False)))
    assert (tokens.num_global_tokens, tokens.prefix().shape) == (0, (6, DIM))


def test_rows_in_several_chunks_are_the_same_video():
    parts = [segment_tokens(i, num_frames=i + 1) for i in range(4)]
    whole = from_arrow(stored(*parts))
    pieces = from_arrow(pa.concat_tables([stored(*parts[:1]), stored(*parts[1:])]))
    assert (pieces.counts, pieces.num_frames) == (whole.counts, whole.num_frames)
    assert torch.equal(pieces.local, whole.local)
    torch.testing.assert_close(pieces.prefix(), whole.prefix())


def test_a_row_out_of_the_middle_of_a_table_is_read_where_it_lies():
    rows = stored(*[segment_tokens(i) for i in range(4)])
    tokens = from_arrow(rows.slice(2, 1))
    assert torch.equal(tokens.local, segment_tokens(2).local.half())
    assert tokens.spans.tolist() == segment_tokens(2).spans.tolist()


def test_frames_are_whole_until_a_token_is_merged():
    part = segment_tokens(0, num_tokens=8, num_frames=4)
    part.sizes[:] = 1
    assert from_arrow(stored(part, segment_tokens(1, num_tokens=1, num_frames=1))).num_whole_frames == 5
    assert from_arrow(stored(part, segment_tokens(1))).num_whole_frames is None


def test_blobs_are_read_where_they_lie():
    rows = stored(segment_tokens(0))
    view = from_arrow(rows).local
    assert view.data_ptr() == rows["local"].chunk(0).buffers()[2].address


def test_int8_is_read_as_float16_and_the_prefix_made_of_it_once():
    parts = [segment_tokens(0, num_frames=6), segment_tokens(1, num_tokens=5, num_frames=2)]
    plain, small = from_arrow(stored(*parts)), from_arrow(stored(*parts, as_dtype="int8"))
    assert (small.local.dtype, small.counts, small.num_frames) == (torch.float16, plain.counts, plain.num_frames)
    assert torch.equal(small.global_tokens, plain.global_tokens)
    assert torch.equal(small.sizes, plain.sizes)
    step = plain.local.abs().amax(dim=1, keepdim=True).float() / 127
    assert ((small.local.float() - plain.local.float()).abs() <= 0.57 * step).all()
    assert torch.equal(small.prefix(), torch.cat([small.global_tokens.half(), small.local]))
    assert torch.equal(small.prefix(with_global=False), small.local)
    assert small.prefix().data_ptr() == small.prefix().data_ptr()
    changed = replace(small, local=small.local * 2)
    assert torch.equal(changed.prefix()[5:], small.local * 2)
    pieces = from_arrow(pa.concat_tables([stored(part, as_dtype="int8") for part in parts]))
    assert torch.equal(pieces.prefix(), small.prefix())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"local": bytes(23)}, r"local of segment 0: 23 bytes are not \[3, 8\] of int8"),
        ({"scales": None}, "segment 0 lacks scales"),
        ({"scales": bytes(5)}, r"scales of segment 0: 5 bytes are not \[3, 1\] of halffloat"),
        ({"scales": np.full(3, np.nan, "<f2").tobytes()}, "in scales are not between 0 and 515.5"),
        ({"scales": np.full(3, -1, "<f2").tobytes()}, "in scales are not between 0 and 515.5"),
        ({"scales": np.full(3, 600, "<f2").tobytes()}, "in scales are not between 0 and 515.5"),
        ({"local": bytes([128] * 24)}, "in local are below -127"),
        ({"dtype": "int4"}, "stored as int4, and only float16 and int8 are known"),
        ({"dtype": "float16"}, r"local of segment 0: 24 bytes are not \[3, 8\] of halffloat"),
    ],
)
def test_int8_that_does_not_hold_what_it_says_is_bad_tokens(changes, reason):
    with pytest.raises(TerminalError, match=reason) as caught:
        from_arrow(stored(segment_tokens(0), segment_tokens(1), as_dtype="int8", **changes))
    assert caught.value.code == ErrorCode.BAD_TOKENS


def test_rows_from_before_there_were_scales_are_no_int8():
    rows = stored(segment_tokens(0)).drop_columns(["scales"])
    assert torch.equal(from_arrow(rows).local, segment_tokens(0).local.half())
    with pytest.raises(TerminalError, match="int8 without scales"):
        from_arrow(stored(segment_tokens(0), as_dtype="int8").drop_columns(["scales"]))


def test_segments_of_one_video_are_of_one_dtype():
    parts = stored(segment_tokens(0)), stored(segment_tokens(1), as_dtype="int8")
    for rows in (pa.concat_tables(parts), pa.concat_tables(parts).combine_chunks()):
        with pytest.raises(TerminalError, match="segments are stored as float16 and int8"):
            from_arrow(rows)


def test_videos_of_one_read_are_those_read_one_by_one():
    videos = [
        stored(segment_tokens(0), segment_tokens(1, num_tokens=1), write_id="a"),
        stored(segment_tokens(2), write_id="b"),
        stored(*[segment_tokens(i, num_frames=i + 1) for i in range(4)], write_id="c"),
    ]
    whole = pa.concat_tables(videos)
    for rows in (whole, whole.combine_chunks(), whole.slice(1)):
        found = videos_from_arrow(rows)
        assert list(found) == ["a", "b", "c"]
        for name, video in found.items():
            alone = from_arrow(rows.filter(pc.equal(rows["write_id"], name)))
            assert (video.counts, video.num_frames) == (alone.counts, alone.num_frames)
            for part in ("local", "sizes", "spans", "global_tokens"):
                assert torch.equal(getattr(video, part), getattr(alone, part))
    assert videos_from_arrow(whole.slice(0, 0)) == {}


@pytest.mark.parametrize(
    "changes", [{"dtype": "int4"}, {"num_tokens": 2}, {"local": None}, {"cls": None}, {"dim": 9}, {"num_frames": 0}]
)
def test_a_video_that_cannot_be_used_leaves_the_others_of_its_read_alone(changes):
    videos = [stored(segment_tokens(i), write_id=name) for i, name in enumerate("abc")]
    videos[1] = stored(segment_tokens(1), write_id="b", **changes)
    found = videos_from_arrow(pa.concat_tables(videos).combine_chunks())
    assert [isinstance(found[name], VideoTokens) for name in "abc"] == [True, changes == {"cls": None}, True]
    assert torch.equal(found["c"].local, segment_tokens(2).local.half())
    mixed = videos_from_arrow(pa.concat_tables([videos[0], stored(segment_tokens(3), as_dtype="int8", write_id="d")]))
    assert [len(video.prefix()) for video in mixed.values()] == [8, 8]


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
        ({"dtype": "int8"}, r"local of segment 0: 48 bytes are not \[3, 8\] of int8"),
        ({"segment": 7}, "not one row for each segment"),
        ({"num_frames": 0}, "at least one frame"),
        ({"num_tokens": 0, "local": b"", "sizes": b"", "spans": b""}, "0 bytes"),
        ({"local": b"1" * 48, "num_tokens": 2}, r"48 bytes are not \[2, 8\]"),
        ({"dtype": None}, "stored as None"),
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
    with pytest.raises(TerminalError, match="segment 1 lacks cls"):
        from_arrow(stored(segment_tokens(0), segment_tokens(1, with_cls=False)))
    for other in (stored(segment_tokens(1, with_cls=False)), stored(segment_tokens(1), dim=4, local=b"1" * 24)):
        with pytest.raises(TerminalError, match="different widths or global layers"):
            from_arrow(pa.concat_tables([one, other]))
    with pytest.raises(TerminalError, match=r"rows for \[\]"):
        from_arrow(one.slice(0, 0))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", ["local", "cls"])
def test_a_single_value_that_is_no_number_is_found(column, value):
    part = segment_tokens(1)
    blob = getattr(part, column).numpy().astype("<f2")
    blob[1, 3] = value
    with pytest.raises(TerminalError, match="not finite") as caught:
        from_arrow(pa.concat_tables([stored(segment_tokens(0)), stored(part, **{column: blob.tobytes()})]))
    assert caught.value.code == ErrorCode.BAD_TOKENS


def test_the_largest_numbers_that_can_be_stored_are_numbers():
    part = segment_tokens(0)
    part.local[0], part.local[1] = 65504.0, -65504.0
    assert from_arrow(stored(part)).local.abs().max() == 65504.0


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_finite_is_not_stored(dtype):
    part = segment_tokens(0)
    part.local[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        part.to_row(dtype)
    part.local[0, 0] = 1e5
    with pytest.raises(OverflowError, match="100000 does not fit into float16"):
        part.to_row(dtype)


def test_values_too_large_to_store_are_refused():
    part = segment_tokens(0)
    part.local[0, 0] = 1e5
    with pytest.raises(OverflowError, match="100000 does not fit into float16"):
        part.to_row()
    part = segment_tokens(0)
    part.sizes[0] = 70_000
    with pytest.raises(OverflowError, match="stands for 70000 patches"):
        part.to_row()
