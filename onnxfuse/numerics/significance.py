"""Is a difference between two models' scores more than chance? Both were scored on the same samples.

Scores are compared pair by pair: the samples that both get right, or both get wrong, say nothing about the
difference, and leaving them out is what makes a few hundred samples enough to see half a point.

- The interval is a paired bootstrap: samples drawn with replacement, the mean difference taken each time, its
  2.5% and 97.5% quantiles. Equal differences are interchangeable, so the draws are multinomial over distinct
  values, which for right-or-wrong scores are three.
- For right-or-wrong scores, McNemar's exact test: of the samples that only one model gets right, each model
  should have half; p is the two-sided binomial tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_CELLS = 2**22  # counts held at a time


@dataclass(frozen=True)
class PairedDifference:
    """Mean scores of two models on the same `samples`, and `difference` = after - before with its 95%
    interval from `low` to `high`. `p_value` is McNemar's, None where scores are not all 0 or 1."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float | None
    samples: int


def paired_difference(
    before: np.ndarray, after: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> PairedDifference:
    """The difference of two vectors of scores, (samples,) each, the same samples in the same order.

    Args:
        before, after: the scores.
        seed: of the bootstrap.
        resamples: how many times samples are drawn.

    Raises:
        ValueError: the vectors differ in length, or are empty.
    """
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"scores of shapes {before.shape} and {after.shape} can't be paired")
    low, high = _interval(after - before, seed, resamples)
    binary = bool(np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    return PairedDifference(
        before=float(before.mean()),
        after=float(after.mean()),
        difference=float((after - before).mean()),
        low=low,
        high=high,
        p_value=mcnemar(before, after) if binary else None,
        samples=len(before),
    )


def _interval(differences: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
    values, counts = np.unique(differences, return_counts=True)
    random = np.random.default_rng(seed)
    total = len(differences)
    step = max(1, _CELLS // len(values))
    means = [
        random.multinomial(total, counts / total, size=min(step, resamples - start)) @ values / total
        for start in range(0, resamples, step)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """The exact two-sided p-value that two models are right equally often; scores (samples,) are 0 or 1."""
    from scipy.special import bdtr

    lost = int(np.count_nonzero(before > after))
    won = int(np.count_nonzero(before < after))
    return min(1.0, 2.0 * float(bdtr(min(lost, won), lost + won, 0.5)))
