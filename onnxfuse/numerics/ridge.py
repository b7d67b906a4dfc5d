"""From moments to weights: ridge regression with a prior, many ridges at once, and the choice among them.

The affine map that is closest to a target in mean square depends on the data only through second moments
(FuseInit, Ghods et al. 2020, Theorem 1): W = C_yx C_xx^-1 and b = mean(y) - W mean(x). Every solve here is
the same system

    (C_xx + r I) D^T = C_xy - C_xx W0^T,      W = W0 + D,

which pulls toward prior weights W0 (zero when there are none) and is the paper's solution at r = 0. The
ridge is given relative to the mean diagonal of C_xx, so that one number serves tensors of any scale. Where
C_xx is singular (dead or duplicated inputs, fewer rows than columns) r = 0 means the solution nearest to W0,
which is also the limit of r -> 0.

Grouped operators are stacks of small systems: every array then has a leading group axis, and a plain operator
is a stack of one. The weight of an Affine is always (outputs, inputs / groups), as in ONNX Conv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnxfuse.errors import NotApplicableError
from onnxfuse.numerics.affine import Affine, Array
from onnxfuse.numerics.moments import Moments

RIDGES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
"""Ridges tried by `choose_ridge`; relative to the mean diagonal of C_xx."""

_CHOLESKY_FROM = 1e-9
"""Above this relative ridge the system's condition number, at most columns / ridge, is safe for Cholesky."""


def solve(moments: Moments, ridge: float, prior: npt.ArrayLike | None = None) -> Affine:
    """The ridge solution for one ridge.

    Args:
        moments: of the data.
        ridge: at least 0, relative to the mean diagonal of C_xx (of each group's own).
        prior: weights (dy, dx / groups) to shrink toward; None is zero.

    Raises:
        ValueError: negative ridge, or a prior of the wrong shape.
        NotApplicableError: no rows, or activations that are not finite.
    """
    if ridge < _CHOLESKY_FROM:
        return path(moments, (ridge,), prior)[0]
    xx, _ = _usable(moments)
    weight = _prior(moments, prior)
    rhs = _right_side(moments, weight)
    for group, scatter in enumerate(xx):
        scale = float(np.trace(scatter)) / len(scatter)
        if scale > 0:  # an input that never moves says nothing: its group keeps the prior
            # The transpose of a symmetric C-ordered matrix is the F-ordered one that LAPACK can factor in
            # place.
            system = scatter.T.copy(order="F")
            system.flat[:: len(system) + 1] += ridge * scale
            factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
            weight[group] += scipy.linalg.cho_solve(factor, rhs[group], check_finite=False).T
    return _affine(moments, weight)


def path(moments: Moments, ridges: Sequence[float], prior: npt.ArrayLike | None = None) -> list[Affine]:
    """The ridge solutions for many ridges, from one eigendecomposition.

    Args:
        moments, prior: as in `solve`.
        ridges: the ridges, in the order of the solutions.

    Raises:
        ValueError, NotApplicableError: as in `solve`.
    """
    spectrum = _Spectrum.of(moments, prior)
    return [spectrum.solution(ridge) for ridge in ridges]


def generalized_cross_validation(
    moments: Moments, ridges: Sequence[float] = RIDGES, prior: npt.ArrayLike | None = None
) -> tuple[float, Affine]:
    """The ridge with the least generalized cross-validation score, and its solution, when no rows are held
    out.

    The score is n RSS / (n - f)^2 summed over groups, f being the effective number of parameters 1 + sum(l /
    (l + r)) over the eigenvalues l (Golub, Heath and Wahba 1979). Rows count as independent, which
    neighboring patches of one image are not; held-out samples, where there are any, are the better judge.

    Args:
        moments, prior: as in `solve`.
        ridges: those to choose from. On a tie the larger one wins.

    Raises:
        ValueError, NotApplicableError: as in `solve`; no ridges.
    """
    spectrum = _Spectrum.of(moments, prior)
    scores = [spectrum.cross_validation(ridge) for ridge in ridges]
    return _first_least(scores, ridges, spectrum.solution)


def choose_ridge(
    fit: Moments,
    held: Moments,
    ridges: Sequence[float] = RIDGES,
    prior: npt.ArrayLike | None = None,
) -> tuple[float, Affine]:
    """The ridge whose solution on `fit` has the least error on `held`, and that solution.

    Args:
        fit: moments of the rows that are fitted.
        held: moments of the rows that judge.
        ridges: those to choose from. On a tie the larger one wins.
        prior: as in `solve`.

    Raises:
        ValueError, NotApplicableError: as in `solve`, for either of the two; no ridges.
    """
    spectrum = _Spectrum.of(fit, prior)
    scores = [held.error(spectrum.solution(ridge)) for ridge in ridges]
    return _first_least(scores, ridges, spectrum.solution)


def per_channel(moments: Moments, channels: int) -> Affine:
    """Each input channel's taps solved alone, as if channels were uncorrelated (FuseInit, Theorem 2).

    Columns are channel-major, dx = channels * taps. The paper's (16) and (17), with column means in place of
    its means per position. Trained networks do have correlated channels, and the sum over channels then
    counts what they share many times: the relative error may well exceed 1, so this serves to reproduce the
    paper and nothing else.

    Raises:
        ValueError: the columns aren't a multiple of `channels`, or the moments are grouped.
        NotApplicableError: as in `solve`.
    """
    (xx, xy), taps = _usable(moments), moments.dx // channels
    if moments.groups != 1 or taps * channels != moments.dx:
        raise ValueError(f"{moments.dx} columns in {moments.groups} groups are not {channels} channels")
    index = np.arange(moments.dx).reshape(channels, taps)
    values, vectors = np.linalg.eigh(xx[0][index[:, :, None], index[:, None, :]])
    rotated = vectors.swapaxes(1, 2) @ xy[0].reshape(channels, taps, -1)
    weight = (
        vectors @ (rotated * _inverse(values, np.zeros((channels, 1)), moments.rounding)[:, :, None])
    ).reshape(moments.dx, -1)
    return _affine(moments, weight.T[None])


@dataclass(frozen=True)
class _Spectrum:
    """The system in its eigenbasis: values (g, p), vectors (g, p, p), rotated right side (g, p, q), prior (g,
    q, p)."""

    moments: Moments
    values: Array
    vectors: Array
    rotated: Array
    prior: Array

    @classmethod
    def of(cls, moments: Moments, prior: npt.ArrayLike | None) -> _Spectrum:
        xx, _ = _usable(moments)
        start = _prior(moments, prior)
        values, vectors = np.linalg.eigh(xx)
        rotated = vectors.swapaxes(1, 2) @ _right_side(moments, start)
        return cls(moments, np.maximum(values, 0.0), vectors, rotated, start)

    def _inverse(self, ridge: float) -> Array:
        if not ridge >= 0:
            raise ValueError(f"ridge must be at least 0, not {ridge}")
        return _inverse(self.values, ridge * self.values.mean(axis=1, keepdims=True), self.moments.rounding)

    def solution(self, ridge: float) -> Affine:
        step = self.vectors @ (self.rotated * self._inverse(ridge)[:, :, None])
        return _affine(self.moments, self.prior + step.swapaxes(1, 2))

    @cached_property
    def _start(self) -> Array:
        return self.moments.errors(_affine(self.moments, self.prior)) * self.moments.n

    def residuals(self, ridge: float) -> Array:
        """Residual sum of squares per group (g,)."""
        inverse = self._inverse(ridge)
        gain = inverse * (
            2.0 - inverse * self.values
        )  # from |y - x d|^2 with d = inverse * z, per eigenvector
        explained = np.einsum("gpq,gp->g", self.rotated**2, gain)
        return np.maximum(self._start.reshape(self.moments.groups, -1).sum(axis=1) - explained, 0.0)

    def cross_validation(self, ridge: float) -> float:
        n = self.moments.n
        parameters = 1.0 + (self.values * self._inverse(ridge)).sum(axis=1)
        # A ridge so small that the fit interpolates has no degrees of freedom left and can't be judged.
        left = n - parameters
        return float(np.sum(n * self.residuals(ridge) / left**2)) if np.all(left > 0) else float("inf")


def _inverse(values: Array, shift: Array, rounding: float) -> Array:
    """1 / (values + shift) per eigenvalue (g, p), shift (g, 1); 0 where that is below rounding of the largest
    value."""
    cutoff = rounding * values.max(axis=1, keepdims=True)
    total = values + shift
    return np.divide(1.0, total, out=np.zeros_like(total), where=(total > cutoff) & (total > 0))


def _first_least(
    scores: Sequence[float], ridges: Sequence[float], solution: Callable[[float], Affine]
) -> tuple[float, Affine]:
    if not ridges:
        raise ValueError("no ridges to choose from")
    ridge = min(zip(scores, ridges, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
    return ridge, solution(ridge)


def _usable(moments: Moments) -> tuple[Array, Array]:
    """The stacked scatter matrices (g, p, p) and (g, p, q), if there is something to solve."""
    if moments.n <= 0:
        raise NotApplicableError("no calibration rows to fit on")
    xx, xy = moments.stacked()
    if not (np.isfinite(xx).all() and np.isfinite(xy).all()):
        raise NotApplicableError("activations on the calibration samples are not finite")
    return xx, xy


def _prior(moments: Moments, prior: npt.ArrayLike | None) -> Array:
    """A fresh (g, q, p) stack of the prior weights."""
    shape = (moments.dy, moments.dx // moments.groups)
    given = np.zeros(shape) if prior is None else np.array(prior, dtype=np.float64)
    if given.shape != shape:
        raise ValueError(f"prior weights are {given.shape}, should be {shape}")
    return given.reshape(moments.groups, -1, shape[1])


def _right_side(moments: Moments, prior: Array) -> Array:
    xx, xy = moments.stacked()
    return xy - xx @ prior.swapaxes(1, 2) if prior.any() else xy.copy()


def best_bias(moments: Moments, weight: npt.ArrayLike) -> Affine:
    """These weights (dy, dx / groups), with the bias that is optimal for them: mean(y) - W mean(x)."""
    return _affine(moments, _prior(moments, weight))


def _affine(moments: Moments, stack: Array) -> Affine:
    """Stack (g, q, p) -> Affine, with the bias that is optimal for these weights."""
    groups = moments.groups
    pulled = np.einsum("gqp,gp->gq", stack, moments.mean_x.reshape(groups, -1)).reshape(-1)
    return Affine(stack.reshape(moments.dy, -1), moments.mean_y - pulled)
