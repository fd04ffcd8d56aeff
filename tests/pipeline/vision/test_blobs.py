import pyarrow as pa
import pytest
import torch

from longvlm.pipeline.vision.blobs import as_tensor, buffers


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_every_value_of_sliced_and_chunked_columns_where_it_lies(kind):
    whole = pa.array([b"ab", None, b"", b"cdef", b"gh"], kind)
    column = pa.chunked_array([whole.slice(1, 3), whole.slice(4), whole.slice(0, 0)])
    values = list(buffers(column))
    assert [None if value is None else value.to_pybytes() for value in values] == [None, b"", b"cdef", b"gh"]
    assert values[2].address == whole.buffers()[2].address + 2


def test_bytes_become_a_tensor_or_a_reason():
    buffer = pa.py_buffer(torch.arange(12, dtype=torch.int16).numpy().tobytes())
    tensor = as_tensor(buffer, pa.int16(), (3, 4))
    assert torch.equal(tensor, torch.arange(12, dtype=torch.int16).view(3, 4))
    assert tensor.data_ptr() == buffer.address
    assert as_tensor(buffer, pa.int16(), (-1, 6)).shape == (2, 6)
    for shape in ((3, 5), (-1, 5), (2, 4)):
        with pytest.raises(ValueError, match="24 bytes are not"):
            as_tensor(buffer, pa.int16(), shape)
    with pytest.raises(ValueError, match="0 bytes are not"):
        as_tensor(pa.py_buffer(b""), pa.int16(), (-1, 4))
