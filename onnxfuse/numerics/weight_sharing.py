"""One weight for several layers, and what share each layer has in its gradient.

"fit" is the weight that is best for the inputs that all of the layers see. With C_s the covariance of a
layer's input, v_s the variance of its output and W0 the mean of the weights,

    W = (sum_s W_s C_s / v_s + r W0) (sum_s C_s / v_s + r I)^-1,

which minimizes the summed relative error of all outputs (RegMean, Jin et al. 2023, equation 2, for the layers
of one network instead of the same layer of several).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from onnxfuse.numerics.similarity import freeze_share

Mode = Literal["fit", "mean", "freeze", "mix"]

RIDGE = 1e-3
"""The ridge of "fit", relative to the mean diagonal of the summed covariances."""


def one_weight(
    weights: Sequence[np.ndarray],
    mode: Mode,
    counts: Sequence[int],
    covariances: Sequence[Sequence[np.ndarray]],
    groups: int,
    random: np.random.Generator,
) -> np.ndarray:
    """The weight (out, columns) that is to stand for several.

    Args:
        weights: (out, columns) each; the first is the one that "freeze" keeps.
        mode: "freeze" keeps the first, "mix" draws each number from one of them, "mean" takes the mean, "fit"
            the one that is best for all inputs.
        counts: number of operators that use each weight; every operator counts once.
        covariances: of "fit", by weight: for each of its operators whose inputs are known their covariance
            (groups * columns, groups * columns).
        groups: of the operators.
        random: of "mix".
    """
    if mode == "freeze":
        return weights[0]
    if mode == "mix":
        drawn = random.integers(len(weights), size=weights[0].shape)
        return np.take_along_axis(np.stack(weights), drawn[None], 0)[0]
    mean = np.average(weights, axis=0, weights=counts)
    if mode == "mean":
        return mean
    return _fitted(weights, covariances, mean, groups)


def _fitted(
    weights: Sequence[np.ndarray],
    covariances: Sequence[Sequence[np.ndarray]],
    mean: np.ndarray,
    groups: int,
) -> np.ndarray:
    """The weight with the least summed relative error over the operators whose inputs are known."""
    rows, columns = len(mean) // groups, mean.shape[1]
    left = np.zeros((groups, columns, columns))
    right = np.zeros((groups, rows, columns))
    for weight, covariance in ((w, c) for w, own in zip(weights, covariances, strict=True) for c in own):
        own = weight.reshape(groups, rows, columns)
        every = np.arange(groups)
        inside = covariance.reshape(groups, columns, groups, columns)[every, :, every]
        product = own @ inside
        variance = float(np.vdot(product, own))
        if variance > 0:
            left += inside / variance
            right += product / variance
    diagonal = np.einsum("gii->gi", left)
    ridge = RIDGE * diagonal.mean(axis=1, keepdims=True)
    ridge[ridge == 0] = 1.0  # an input that never moves says nothing: the mean stays
    diagonal += ridge
    right += ridge[:, :, None] * mean.reshape(groups, rows, columns)
    return np.linalg.solve(left, right.swapaxes(1, 2)).swapaxes(1, 2).reshape(mean.shape)


def gradient_shares(weights: Sequence[np.ndarray], mode: Mode, counts: Sequence[int]) -> list[float]:
    """The share of each operator's gradient in that of the common weight, weight by weight.

    Equal ones; or, of "freeze" (O'Neill et al. 2021, equation 6), gamma for the layer that was kept, the
    others together what is left.

    Args:
        weights, mode, counts: as in `one_weight`.
    """
    number = sum(counts)
    if mode != "freeze":
        return [1 / number] * number
    kept = float(np.mean([freeze_share(weights[0], other) for other in weights[1:]]))
    rest = number - counts[0]
    return [kept / counts[0]] * counts[0] + [(1 - kept) / rest] * rest
