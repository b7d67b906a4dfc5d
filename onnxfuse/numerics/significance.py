"""Is a difference between two models' scores more than chance? Both were scored on the same samples.

Scores are compared pair by pair: the samples that both get right, or both get wrong, say nothing about the
difference, and leaving them out is what makes a few hundred samples enough to see half a point.

Interval and p-value come from one test: the interval is what the test does not reject, so it leaves out 0
exactly where p < 1 - confidence.

- Scores that are 0 or 1. Of n samples, `won` are right with the second model alone, `lost` with the first
  alone. The score statistic of a difference D is

      T(D) = (won - lost - n D) / sqrt(n (2 q + D (1 - D))),

  where q, the probability to lose, is the larger root of 2 n q^2 + B q - lost D (1 - D) = 0 with
  B = (2 n - won + lost) D - won - lost (its maximum likelihood estimate, given D). The interval holds every D
  with |T(D)| <= z; T(0) = (won - lost) / sqrt(won + lost) is McNemar's test. No sample lost out of n does not
  mean that none ever will be: the interval then reaches down to -z^2 / (n + z^2), 0.06 of 60 samples.
- Other scores: Student's paired t-test, and its interval.

Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12,
1947. T. Tango, Equivalence test and confidence interval for the difference in proportions for the
paired-sample design, Statistics in Medicine 17, 1998. M. Fagerland, S. Lydersen, P. Laake, Recommended tests
and confidence intervals for paired binomial proportions, Statistics in Medicine 33, 2014, find that both hold
their level with few samples, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
"""Of an interval where nobody asked for another."""

_MOST = 10**7  # samples that nobody has
_HALVINGS = 60  # of an interval no longer than 2, down to the last place


@dataclass(frozen=True)
class PairedDifference:
    """Mean scores of two models on the same `samples`, and `difference` = after - before with its interval
    from `low` to `high`.

    Attributes:
        p_value: of no difference; None where a single sample leaves that open.
        test: "McNemar" where all scores are 0 or 1, else "t".
        spread: standard deviation of the difference of one sample.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float | None
    samples: int
    confidence: float
    test: str
    spread: float

    def samples_for(self, drop: float) -> int | None:
        """About how many samples like these would put `low` at -`drop` or above; None: no number would."""
        if self.difference + drop <= 0:
            return None
        n = 1
        while self._low_of(n) < -drop:
            if n > _MOST:
                return None
            n = n + max(1, n // 50)
        return n

    def _low_of(self, n: int) -> float:
        """The low end with `n` samples of which the same shares are lost and won."""
        if self.test == "t":
            return _student(self.difference, self.spread, n, self.confidence)[0]
        unequal = self.spread**2 + self.difference**2
        won, lost = (unequal + self.difference) / 2 * n, (unequal - self.difference) / 2 * n
        return tango(won, lost, n, self.confidence)[0]


def paired_difference(
    before: np.ndarray, after: np.ndarray, *, confidence: float = CONFIDENCE
) -> PairedDifference:
    """The difference of two vectors of scores, (samples,) each, the same samples in the same order.

    Args:
        before, after: the scores.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: the vectors differ in length, or are empty.
    """
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"scores of shapes {before.shape} and {after.shape} can't be paired")
    samples, differences = len(before), after - before
    mean, spread = float(differences.mean()), float(differences.std())
    p_value: float | None
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        won, lost = int(np.count_nonzero(differences > 0)), int(np.count_nonzero(differences < 0))
        test, p_value = "McNemar", mcnemar(won, lost)
        low, high = tango(won, lost, samples, confidence)
    else:
        test = "t"
        low, high, p_value = _student(mean, spread, samples, confidence)
    return PairedDifference(
        before=float(before.mean()),
        after=float(after.mean()),
        difference=mean,
        low=low,
        high=high,
        p_value=p_value,
        samples=samples,
        confidence=confidence,
        test=test,
        spread=spread,
    )


def mcnemar(won: int, lost: int) -> float:
    """The two-sided p-value that two models are right equally often.

    Args:
        won: samples that only the second gets right.
        lost: samples that only the first gets right.
    """
    return math.erfc(abs(won - lost) / math.sqrt(2 * (won + lost))) if won + lost else 1.0


def tango(won: float, lost: float, samples: int, confidence: float) -> tuple[float, float]:
    """Tango's interval of the difference of two paired proportions.

    Args:
        won, lost: as in `mcnemar`.
        samples: in all.
        confidence: between 0 and 1.
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))

    def accepted(difference: float) -> bool:
        b = (2 * samples - won + lost) * difference - won - lost
        c = -lost * difference * (1 - difference)
        q = (math.sqrt(max(b * b - 8 * samples * c, 0.0)) - b) / (4 * samples)
        variance = samples * (2 * q + difference * (1 - difference))
        return (won - lost - samples * difference) ** 2 <= z * z * variance

    def end(outside: float) -> float:
        inside = (won - lost) / samples
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        return inside

    return end(-1.0), end(1.0)


def _student(mean: float, spread: float, n: int, confidence: float) -> tuple[float, float, float | None]:
    """The interval and the p-value of the paired t-test; `spread` is that of the sample at hand."""
    from scipy.special import stdtr, stdtrit

    if n < 2:
        return -math.inf, math.inf, None
    error = spread / math.sqrt(n - 1)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    reach = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return mean - reach, mean + reach, 2 * float(stdtr(n - 1, -abs(mean) / error))
