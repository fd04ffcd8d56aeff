import pyarrow as pa
import pytest
import torch

from longvlm.pipeline.vision.requantise import as_int8
from longvlm.pipeline.vision.tokens import SegmentTokens
from longvlm.schemas import tables
from longvlm.schemas.errors import ErrorCode, TerminalError


def segments(dim):
    generator = torch.Generator().manual_seed(dim)
    for number, num_tokens in enumerate((3, 1, 7)):
        yield SegmentTokens(
            segment=number,
            num_frames=4,
            local=torch.randn(num_tokens, dim, generator=generator) * 1.7,  # float32: rounded to float16 on its way
            sizes=torch.ones(num_tokens),
            spans=torch.zeros(num_tokens, 2),
            cls=torch.randn(2, dim, generator=generator),
            positions=torch.randn(num_tokens, 3, generator=generator).double(),
        )


def stored(dim, dtype):
    ids = {"video_id": "v", "recipe": "r", "write_id": "w"}
    return pa.Table.from_pylist([ids | one.to_row(dtype) for one in segments(dim)], tables.TOKENS)


@pytest.mark.parametrize("dim", [8, 64, 200])
def test_what_was_stored_as_float16_becomes_what_indexing_in_int8_stores(dim):
    rows, wanted = stored(dim, "float16"), stored(dim, "int8")
    assert as_int8(rows).equals(wanted)
    assert as_int8(rows.slice(1, 2)).equals(wanted.slice(1, 2))
    assert as_int8(pa.concat_tables([rows.slice(2), rows.slice(0, 2)])).equals(wanted)


def test_rows_that_do_not_hold_what_they_say_are_refused():
    rows = stored(8, "float16").to_pylist()
    rows[1]["local"] = None
    with pytest.raises(TerminalError, match="segment 1 lacks local") as caught:
        as_int8(pa.Table.from_pylist(rows, tables.TOKENS))
    assert caught.value.code == ErrorCode.BAD_TOKENS
