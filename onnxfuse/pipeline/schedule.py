"""Compression and retraining by turns: how far each step goes, and how long it trains.

O'Neill et al. 2021 ("Layer fusion", "Compression retraining") compress a little, retrain, and repeat. Two
schedules:

- `uniform:steps=S`: every step goes equally far and trains equally long;
- `exponential:steps=S`: every step goes half as far as the one before and trains twice as long, for what is
  lost late is the harder to make up for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from onnxfuse.errors import InputError

FORM = "write uniform:steps=4 or exponential:steps=4"
MOST_TURNS = 32


@dataclass(frozen=True)
class Schedule:
    """A number of steps, each half as far and twice as long as the one before, or all alike."""

    exponential: bool
    steps: int

    def shares(self) -> list[float]:
        """The share of the whole way that is done after each step; the last is 1."""
        lengths = 0.5 ** np.arange(self.steps) if self.exponential else np.ones(self.steps)
        return [*(np.cumsum(lengths) / lengths.sum()).tolist()[:-1], 1.0]

    def epochs(self, total: int) -> list[int]:
        """The number of epochs of each step: at least one, more than `total` in all if there are too few."""
        lengths = 2.0 ** np.arange(self.steps) if self.exponential else np.ones(self.steps)
        ends = np.round(np.cumsum(lengths) / lengths.sum() * total).astype(int)
        return [max(int(n), 1) for n in np.diff(ends, prepend=0)]


def parse_schedule(text: str) -> Schedule:
    """The schedule that a user writes as `uniform:steps=4`.

    Raises:
        InputError: it has another form.
    """
    found = re.fullmatch(r"(uniform|exponential):steps=(\d+)", text.replace(" ", ""))
    steps = int(found[2]) if found and len(found[2]) < 9 else 0
    if found is None or not 1 <= steps <= MOST_TURNS:
        limit = f" with 1 to {MOST_TURNS} steps" if found else ""
        raise InputError(f"--schedule '{text}' is no schedule{limit}; {FORM}")
    return Schedule(found[1] == "exponential", steps)
