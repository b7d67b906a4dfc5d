"""Weights that a growing network is free to choose.

They are uniform with the standard deviation s of the kernel that they join: U(-s sqrt(3), s sqrt(3)).
(Painter prints U(-s/sqrt(3), s/sqrt(3)) in section 6, which has a standard deviation of s/3.) A new kernel
behind another one has its standard deviation too, but no more than sqrt(2 / n) for n inputs to an output (He
et al., 2015): where a convolution of 3 channels is followed by one of 64, or BatchNormalization has been
folded in, s can multiply what is read tenfold, and a branch that is zero as the difference of large numbers
is not zero in float arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deviation_of(kernel: np.ndarray) -> float:
    """The standard deviation of a kernel; of one with equal weights, such as a single one, their size."""
    wide = kernel.astype(np.float64)
    return float(wide.std() or np.abs(wide).max(initial=0.0))


def behind(kernel: np.ndarray, inputs: int) -> float:
    """Standard deviation of a new kernel behind this one, each of whose outputs sums up `inputs` numbers."""
    return min(deviation_of(kernel), float(np.sqrt(2 / inputs)))


def uniform(random: np.random.Generator, shape: Sequence[int], deviation: float) -> np.ndarray:
    """Random numbers of this shape, float64, uniform about zero.

    Args:
        random: what draws them.
        shape: theirs.
        deviation: their standard deviation.
    """
    bound = deviation * np.sqrt(3.0)
    return random.uniform(-bound, bound, shape)
