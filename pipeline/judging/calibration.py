"""Calibration of confidences: how far they are from shares that are right, and the temperature that brings them nearer.

After Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017, arXiv 1706.04599): the expected calibration
error of its section 2, and the temperature scaling of its section 4.2.

Shape letters: Q questions, O options of the one that has most, T temperatures.
"""

# ruff: noqa: N806 - arrays are named by their shape

from collections.abc import Sequence

import numpy as np

NUM_BINS = 15  # as in the paper
_TEMPERATURES_T = np.geomspace(0.1, 50, 1250)  # half a percent apart


def calibration_error(confidences: Sequence[float], is_right: Sequence[bool]) -> float | None:
    """The expected calibration error, 0 to 1: how far confidence is from the share that is right, on the average.

    Answers are counted in bins of equal width by their confidence; bins weigh as much as they hold. None without any.
    """
    if not confidences:
        return None
    found, right = np.asarray(confidences, np.float64), np.asarray(is_right, np.float64)
    bins = np.clip(np.ceil(found * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, found - right, NUM_BINS)
    return float(np.abs(gaps).sum() / len(found))


def fit_temperature(shares: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """The temperature by which the right options are likeliest, of those from 0.1 to 50.

    Args:
        shares: of each question's options, at temperature 1.
        right: which of them is right.
    """
    most = max(map(len, shares))
    logp_QO = np.full((len(shares), most), -np.inf)
    for question, own in enumerate(shares):
        logp_QO[question, : len(own)] = np.log(np.maximum(own, np.finfo(np.float64).tiny))
    right_Q = logp_QO[np.arange(len(shares)), list(right)]
    losses_T = [np.logaddexp.reduce(logp_QO / t, axis=1).mean() - right_Q.mean() / t for t in _TEMPERATURES_T]
    return float(_TEMPERATURES_T[int(np.argmin(losses_T))])
