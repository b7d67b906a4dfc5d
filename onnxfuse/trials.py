"""How candidate rewrites are judged before any is made: by what they do to the network's outputs.

A trial is fitted on some of the fit samples and judged on others of them, so that the samples which the
report quotes have decided nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from scipy.special import log_softmax

from onnxfuse import verification
from onnxfuse.calibration import Calibration
from onnxfuse.errors import NotApplicableError, VerificationError
from onnxfuse.graph import Model
from onnxfuse.pass_manager import Context
from onnxfuse.runtime import Feed, Runtime

Measure = Literal["error", "kl"]
T = TypeVar("T")


class Made(Protocol):
    """A rewritten model, and whatever belongs to it."""

    @property
    def model(self) -> Model: ...


M = TypeVar("M", bound=Made)

CAREFUL = 0.1
"""Bound on the relative output error where the user gives neither a bound nor how far to go."""


def error_bound(context: Context) -> tuple[float, str]:
    """The bound on the relative output error, and where it comes from."""
    if context.max_error is None:
        return CAREFUL, "the careful default"
    return context.max_error, "--max-error"


def probe(make: Callable[[], M], context: Context) -> tuple[M | None, float]:
    """What `make` makes and its model's output error on the held-out samples; None and infinity where that
    fails."""
    try:
        made = make()
        error = verification.output_error(
            context.original, made.model, context.calibration.held_out, context.runtime
        )
    except (NotApplicableError, VerificationError) as failure:
        context.journal("probe failed", failure=str(failure))
        return None, math.inf
    return made, error.worst


@dataclass(frozen=True)
class Trials:
    """What trials fit on, some of the fit samples, and judge by: the original's outputs on others of them."""

    calibration: Calibration
    feeds: list[Feed]
    outputs: list[Feed]
    measure: Measure

    @classmethod
    def of(cls, context: Context, samples: int, measure: Measure = "error") -> Trials:
        few = context.calibration.part(samples)
        feeds = [batch.feed for batch in few.held_out]
        base = context.runtime.session(context.original)
        return cls(few, feeds, [base.run(feed) for feed in feeds], measure)

    def change(self, trial: Model, runtime: Runtime) -> float:
        """How far the outputs of `trial` are from the original's."""
        session = runtime.session(trial)
        return output_change(self.outputs, [session.run(feed) for feed in self.feeds], self.measure)


def output_change(
    before: Sequence[dict[str, np.ndarray]], after: Sequence[dict[str, np.ndarray]], measure: Measure
) -> float:
    """How far the outputs moved, summed over those that are numbers; infinite where they are not finite."""
    total = 0.0
    for name in before[0]:
        if not np.issubdtype(np.asarray(before[0][name]).dtype, np.floating):
            continue
        pairs = [(np.asarray(x[name]), np.asarray(y[name])) for x, y in zip(before, after, strict=True)]
        if any(x.shape != y.shape or not np.isfinite(y).all() for x, y in pairs):
            return math.inf
        width = pairs[0][0].shape[-1] if measure == "kl" and pairs[0][0].ndim else 1
        a, b = (
            np.concatenate([pair[i].reshape(-1, width) for pair in pairs]).astype(np.float64) for i in (0, 1)
        )
        total += _divergence(a, b) if measure == "kl" else _squared(a, b)
    return total


def _squared(a: np.ndarray, b: np.ndarray) -> float:
    """Squared difference over variance."""
    spread = float(np.var(a))
    return float(np.mean((a - b) ** 2)) / spread if spread > 0 else 0.0


def _divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of softmax(b) from softmax(a), rows of logits."""
    p, q = log_softmax(a, axis=1), log_softmax(b, axis=1)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))


def longest(count: int, guess: int, attempt: Callable[[int], T | None]) -> tuple[T | None, int]:
    """What `attempt` makes of the largest number, at most `count`, that it accepts, and that number; what it
    accepts is taken to be monotone. None and 0 where it accepts not even 1."""
    best: T | None = None
    low, high, middle = 0, count, min(max(guess, 1), count)
    while low < high:
        found = attempt(middle)
        if found is None:
            high = middle - 1
        else:
            best, low = found, middle
        # The guess is usually near: look beside it before halving what is left.
        middle = min(low + 1, high) if best is not None and middle == guess else (low + high + 1) // 2
    return best, low
