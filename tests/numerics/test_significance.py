"""Paired differences of scores, held against SciPy, published figures and the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from onnxfuse.numerics.significance import mcnemar, paired_difference, tango


def binary(lost: int, won: int, right: int, wrong: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.r_[np.ones(lost), np.zeros(won), np.ones(right), np.zeros(wrong)]
    return before, np.r_[np.zeros(lost), np.ones(won), np.ones(right), np.zeros(wrong)]


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 1), (3, 9), (40, 40), (200, 150)])
def test_mcnemar(lost: int, won: int) -> None:
    expected = stats.chi2.sf((lost - won) ** 2 / (lost + won), 1) if lost + won else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected)
    assert paired_difference(*binary(lost, won, 30, 10)).p_value == pytest.approx(expected)


def test_a_published_interval() -> None:
    """The example of Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness of 21 children."""
    assert tango(1, 7, 21, 0.95) == pytest.approx((-0.517, -0.026), abs=6e-4)


@pytest.mark.parametrize(("won", "lost", "n"), [(3, 9, 100), (0, 4, 50), (40, 41, 90), (0, 0, 60)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_ends_are_where_the_likelihood_says(won: int, lost: int, n: int, confidence: float) -> None:
    """The score statistic, with the probability to lose found by maximizing the likelihood numerically."""
    z = stats.norm.ppf((1 + confidence) / 2)
    for end in tango(won, lost, n, confidence):

        def unlikely(q: float, d: float = end) -> float:
            cells = ((won, q + d), (lost, q), (n - won - lost, 1 - 2 * q - d))
            return -sum(count * math.log(p) for count, p in cells if count)

        within = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        q = optimize.minimize_scalar(unlikely, bounds=within, method="bounded", options={"xatol": 1e-11}).x
        variance = (2 * q + end * (1 - end)) / n
        assert abs((won - lost) / n - end) == pytest.approx(z * math.sqrt(variance), rel=1e-4)


def test_no_loss_seen_is_not_no_loss() -> None:
    found = paired_difference(*binary(0, 0, 50, 10))
    z = stats.norm.ppf(0.975)
    assert (found.difference, found.p_value) == (0, 1)
    assert found.low == pytest.approx(-(z**2) / (60 + z**2))
    assert found.high == pytest.approx(-found.low)


@pytest.mark.parametrize("lost", range(14))
def test_interval_and_p_value_are_one_test(lost: int) -> None:
    for won in range(14):
        found = paired_difference(*binary(lost, won, 20, 3))
        assert found.p_value is not None
        assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_other_scores(confidence: float) -> None:
    random = np.random.default_rng(5)
    before = random.random(40)
    after = before + random.normal(0.02, 0.1, 40)
    found = paired_difference(before, after, confidence=confidence)
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.test, found.samples, found.confidence) == ("t", 40, confidence)


def test_scores_that_do_not_vary() -> None:
    scores = np.full(5, 0.25)
    same = paired_difference(scores, scores)
    assert (same.low, same.high, same.p_value) == (0, 0, 1)
    one = paired_difference(scores[:1], scores[:1])
    assert (one.low, one.high, one.p_value) == (-math.inf, math.inf, None)


def test_coverage() -> None:
    """At least 95 % of the intervals hold the truth, as nearly as 2,000 draws can tell."""
    random = np.random.default_rng(0)
    draws = random.multinomial(80, [0.04, 0.10, 0.86], size=2000)
    intervals = [tango(won, lost, 80, 0.95) for won, lost, _ in draws.tolist()]
    held = np.mean([low <= -0.06 <= high for low, high in intervals])
    assert 0.94 < held < 0.975


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (2, 2), (1, 3)])
def test_how_many_samples_would_do(lost: int, won: int) -> None:
    found = paired_difference(*binary(lost, won, 50, 6))
    assert found.low < -0.01
    needed = found.samples_for(0.01)
    assert needed is not None
    shares = won / found.samples * needed, lost / found.samples * needed
    assert tango(*shares, needed, 0.95)[0] == pytest.approx(-0.01, rel=0.05)
    assert found.samples_for(-found.difference - 0.01) is None


def test_how_many_samples_would_do_for_other_scores() -> None:
    random = np.random.default_rng(1)
    before = random.random(30)
    after = before + np.where(np.arange(30) % 2, 0.1, -0.1)
    found = paired_difference(before, after)
    needed = found.samples_for(0.01)
    assert needed == pytest.approx((1.96 * 0.1 / 0.01) ** 2, rel=0.05)


def test_unpaired_scores() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        paired_difference(np.zeros(3), np.zeros(4))
