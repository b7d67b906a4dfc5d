"""Weights that a growing network is free to choose.

They are uniform with the standard deviation s of the kernel that they join or stand behind: U(-s sqrt(3), s
sqrt(3)). (Painter prints U(-s/sqrt(3), s/sqrt(3)) in section 6, which has a standard deviation of s/3.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spread(kernel: np.ndarray) -> float:
    """Standard deviation of a kernel; of one with equal weights, such as a single one, their size."""
    wide = kernel.astype(np.float64)
    return float(wide.std() or np.abs(wide).max(initial=0.0))


def uniform(random: np.random.Generator, shape: Sequence[int], deviation: float) -> np.ndarray:
    """float64 of this shape, uniform about zero with this standard deviation."""
    bound = deviation * np.sqrt(3.0)
    return random.uniform(-bound, bound, shape)
