"""Paired differences of scores, held against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from onnxfuse.numerics.significance import mcnemar, paired_difference


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 1), (3, 9), (40, 40), (200, 150)])
def test_mcnemar(lost: int, won: int) -> None:
    before = np.r_[np.ones(lost), np.zeros(won), np.ones(30), np.zeros(10)]
    after = np.r_[np.zeros(lost), np.ones(won), np.ones(30), np.zeros(10)]
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(before, after) == pytest.approx(expected)


@pytest.mark.parametrize("binary", [True, False])
def test_paired_bootstrap(binary: bool) -> None:
    random = np.random.default_rng(5)
    before = random.random(400)
    after = before + random.normal(0.02, 0.1, 400)
    if binary:
        before, after = (before > 0.3).astype(float), (after > 0.3).astype(float)
    found = paired_difference(before, after)
    expected = stats.bootstrap(
        (after - before,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.difference == pytest.approx(float(np.mean(after - before)))
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)
    assert (found.p_value is not None) is binary
    assert found == paired_difference(before, after)


def test_unpaired_scores() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        paired_difference(np.zeros(3), np.zeros(4))
