import numpy as np
import pytest
import torch

from longvlm.pipeline.vision.int8 import MAX_SCALE, check, dequantise, make_scratch, num_groups, quantise

LEAST = 2.0**-24  # the smallest float16 above 0


def back(quantised, scales):
    check(quantised, scales)
    rows = torch.empty(quantised.shape, dtype=torch.float16)
    dequantise(quantised, scales.float(), rows, make_scratch(rows.shape[1]))
    return rows


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 1), (3, 8), (2, 64), (5, 100), (300, 1024), (2, 4097)])
def test_every_number_is_the_nearest_step_of_its_64_channels(num_tokens, dim):
    generator = torch.Generator().manual_seed(dim)
    rows = (torch.randn(num_tokens, dim, generator=generator) * 10 ** torch.randn(num_tokens, 1)).half()
    quantised, scales = quantise(rows)
    assert scales.shape == (num_tokens, num_groups(dim)) == (num_tokens, -(-dim // 64))
    of_channel = scales.double().repeat_interleave(64, dim=1)[:, :dim]
    exact = np.rint(rows.double().numpy() / of_channel.numpy())  # half to even, as is asked for
    assert np.array_equal(quantised.numpy(), exact)
    assert torch.equal(back(quantised, scales), (quantised.double() * of_channel).half())
    # half a step, and what float16 rounds of 127 of them
    assert ((back(quantised, scales).double() - rows.double()).abs() <= of_channel * (0.5 + 127 / 2048) + LEAST).all()


@pytest.mark.parametrize(
    "largest", [LEAST, 5 * LEAST, 126 * LEAST, 127 * LEAST, 128 * LEAST, 2.0**-14, 1.0, 127.0, 254.25, 65472.0, 65504.0]
)
def test_a_scale_is_the_smallest_that_clips_nothing(largest):
    rows = torch.tensor([[largest, -largest, 0.0, -0.0]], dtype=torch.float16)
    quantised, scales = quantise(rows)
    scale = scales.item()
    assert quantised.tolist() == [[round(largest / scale), -round(largest / scale), 0, 0]]
    below = np.nextafter(np.float16(scale), np.float16(0))
    assert float(below) * 127 < largest
    assert scale * 127 >= largest or scale == MAX_SCALE
    assert back(quantised, scales).abs().max() <= 65504
    assert back(quantised, scales)[0, 0].item() == pytest.approx(largest, rel=1 / 127)


def test_where_all_is_zero_the_scale_is():
    rows = torch.zeros(2, 130, dtype=torch.float16)
    rows[1, 64] = -2.0
    quantised, scales = quantise(rows)
    assert scales.ne(0).tolist() == [[False, False, False], [False, True, False]]
    assert torch.equal(back(quantised, scales).abs() > 1, rows.abs() > 1)
    assert back(quantised, scales)[0].eq(0).all()


def test_the_least_and_the_largest_in_one_token_do_not_touch_each_other():
    rows = torch.full((1, 128), 65504.0, dtype=torch.float16)
    rows[0, 64:] = LEAST
    assert torch.equal(back(*quantise(rows))[0, 64:], rows[0, 64:])


@pytest.mark.parametrize("scale", [-1.0, -LEAST, np.nan, np.inf, 516.0])
def test_scales_that_are_none_are_refused(scale):
    quantised, scales = quantise(torch.ones(2, 70, dtype=torch.float16))
    scales[1, 1] = scale
    with pytest.raises(ValueError, match=r"in scales are not between 0 and 515\.5"):
        check(quantised, scales)


def test_a_step_below_the_least_is_refused():
    quantised, scales = quantise(torch.ones(2, 70, dtype=torch.float16))
    quantised[1, 69] = -128
    with pytest.raises(ValueError, match="in local are below -127"):
        check(quantised, scales)
