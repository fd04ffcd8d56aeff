import torch

from longvlm.pipeline.transfer import Fetch, tensor_on, to_device


def test_what_goes_there_comes_back(device):
    values = torch.randn(5, 3, dtype=torch.float16)
    there = to_device(values, device)
    assert there.device.type == device.type
    assert there.dtype == torch.float16
    numbers = tensor_on(device, [3, 1, 2])
    back, doubled, none = Fetch(there, 2 * numbers, there[:0]).wait()
    assert back.equal(values)
    assert doubled.tolist() == [6, 2, 4]
    assert none.shape == (0, 3)
    assert tensor_on(device, [True, False], torch.bool).dtype == torch.bool


def test_on_a_cpu_nothing_is_copied():
    values = torch.randn(4)
    assert to_device(values, torch.device("cpu")) is values
    assert Fetch(values).wait()[0] is values
