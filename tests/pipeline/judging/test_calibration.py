import math

import numpy as np
import pytest

from longvlm.pipeline.judging.calibration import calibration_error, fit_temperature


def test_the_error_is_the_gap_of_each_bin_by_what_it_holds():
    confidences = [0.95, 0.95, 0.95, 0.95, 0.55, 0.55]
    is_right = [True, True, True, False, True, False]
    # 0.95 - 0.75 for four of six, 0.55 - 0.5 for two of six
    assert calibration_error(confidences, is_right) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert calibration_error([1.0, 1.0, 0.0], [True, True, False]) == 0
    assert calibration_error([1.0] * 4, [True, False, False, False]) == pytest.approx(0.75)
    assert calibration_error([], []) is None


def test_the_temperature_that_shares_were_sharpened_by_is_found():
    random = np.random.default_rng(0)
    shares, right = [], []
    for _ in range(4000):
        logits = 2 * random.standard_normal(int(random.integers(2, 7)))
        true = np.exp(logits) / np.exp(logits).sum()
        right.append(int(random.choice(len(true), p=true)))
        sharp = np.exp(3 * logits)
        shares.append((sharp / sharp.sum()).tolist())
    assert fit_temperature(shares, right) == pytest.approx(3, rel=0.06)


def test_a_share_of_nothing_is_still_compared():
    assert math.isfinite(fit_temperature([[1.0, 0.0], [0.7, 0.3]], [1, 0]))
