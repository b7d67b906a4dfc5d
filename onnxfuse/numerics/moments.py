"""Streaming second moments of an operator's inputs and outputs.

Nothing of the data is kept but sums, so memory doesn't grow with the number of samples. Rows are shifted by
the mean of the first ones before products are formed: second moments about a point inside the data lose no
digits to a mean that is large beside the spread, and unlike a running mean it costs no update of the whole
matrix per batch. (The loss is bounded: the shift is off by d only if the total variance is at least about d^2
times the share of those first rows.) Few rows at a time would starve BLAS, so they are buffered; X^T X is a
symmetric rank-k update in place, half the work of a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg.blas

from onnxfuse.errors import NotApplicableError
from onnxfuse.numerics.affine import Affine, Array
from onnxfuse.numerics.sampling import gather, output_size, patches

_BUFFER_ROWS = 1024
_BUFFER_ELEMENTS = 1 << 20
_PATCH_ELEMENTS = 1 << 22


class Moments:
    """Joint second moments of x (dx,) and y (dy,) over weighted rows, accumulated in float64.

    With groups, x and y split into that many equal runs and only the moments within a group are kept (a
    grouped or depthwise Conv is a stack of small regressions).

    With `single`, products over a buffer of about a thousand rows are summed in float32 before they join the
    float64 sums: nearly twice as fast, and errors are off by about 1e-7 of the variance. It does for ranking
    and for fits whose error is far above that, not for showing that one is zero.

    Attributes:
        dx, dy, groups: sizes.
        n: number of rows so far (sum of their weights).
        rounding: eigenvalues of xx below this share of the largest one are noise.
    """

    def __init__(self, dx: int, dy: int, groups: int = 1, *, single: bool = False) -> None:
        """No rows yet.

        Args:
            dx: columns of x.
            dy: columns of y.
            groups: equal runs that x and y are split into.
            single: whether buffered products are summed in float32 (see the class).

        Raises:
            ValueError: sizes that the groups do not divide.
        """
        if min(dx, dy, groups) < 1 or dx % groups or dy % groups:
            raise ValueError(f"{dx} inputs and {dy} outputs can't be split into {groups} groups")
        self.dx, self.dy, self.groups = dx, dy, groups
        self.n = 0.0
        self._dtype: type[np.floating[Any]] = np.float32 if single else np.float64
        # Rounding perturbs a sum of n products by about eps, and p of them an eigenvalue by at most p eps; in
        # single precision the errors of many buffers average out, and that bound would discard directions
        # that matter.
        eps = float(np.finfo(self._dtype).eps)
        self.rounding = 4 * eps if single else dx // groups * eps
        self._shift: Array | None = None  # (dx + dy,), fixed by the first rows
        self._sum = np.zeros(dx + dy)  # of shifted rows
        # Scatter about the shift. With one group only the upper triangle of _xx is valid until _settle.
        self._xx = np.zeros((groups, dx // groups, dx // groups))
        self._xy = np.zeros((groups, dx // groups, dy // groups))
        self._yy = np.zeros(dy)
        self._settled = True
        self._rows = max(64, min(_BUFFER_ROWS, _BUFFER_ELEMENTS // (dx + dy)))
        self._buffer: _RowBuffer | None = None

    def add(self, x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Take in rows.

        Args:
            x: (n, dx), of any real type.
            y: (n, dy), of any real type.
            weights: (n,), at least 0; None: all 1. A row of weight 0 counts as absent, whatever it holds:
                that is how padding tokens are left out.

        Raises:
            ValueError: shapes that don't fit, or a weight that is negative or not finite.
        """
        x, y = np.asarray(x), np.asarray(y)
        if x.ndim != 2 or y.shape != (len(x), self.dy) or x.shape[1] != self.dx:
            raise ValueError(f"rows {x.shape} and {y.shape} don't fit {self.dx} inputs and {self.dy} outputs")
        roots = None
        if weights is not None:
            x, y, roots = _weighted(x, y, np.asarray(weights, dtype=np.float64))
        if not len(x):
            return
        if self._shift is None:
            self._shift = np.concatenate([_middle(x[: self._rows]), _middle(y[: self._rows])])
        if self._buffer is None:
            shifts = self._shift[: self.dx], self._shift[self.dx :]
            self._buffer = _RowBuffer(self._rows, shifts, self._dtype)
        for block in self._buffer.fill(x, y, roots):
            self._sum_up(*block)
        self.n += float(len(x)) if roots is None else float(roots @ roots)

    def _sum_up(self, x: npt.NDArray[Any], y: npt.NDArray[Any], roots: npt.NDArray[Any]) -> None:
        """Add shifted rows, scaled by the roots of their weights, to the sums."""
        if not len(roots):
            return
        self._settled = False
        self._sum += np.concatenate([roots @ x, roots @ y])
        self._yy += np.einsum("nq,nq->q", y, y)
        if self.groups == 1 and self._dtype == np.float32:
            self._xx[0] += scipy.linalg.blas.ssyrk(1.0, x.T, lower=1).T
            self._xy[0] += x.T @ y
        elif self.groups == 1:
            # C-ordered matrices are the transposes BLAS wants: updated in place, nothing is copied.
            gram, cross = self._xx[0].T, self._xy[0].T
            scipy.linalg.blas.dsyrk(1.0, x.T, beta=1.0, c=gram, lower=1, overwrite_c=1)
            scipy.linalg.blas.dgemm(1.0, y.T, x.T, beta=1.0, c=cross, trans_b=1, overwrite_c=1)
        else:
            left = x.reshape(len(x), self.groups, -1).transpose(1, 2, 0)
            self._xx += left @ left.swapaxes(1, 2)
            self._xy += left @ y.reshape(len(y), self.groups, -1).swapaxes(0, 1)

    def _settle(self) -> None:
        """Empty and free the buffer and move the shift to the mean: the sums are then centered."""
        if self._buffer is not None:
            self._sum_up(*self._buffer.drain())
        self._buffer = None
        if self._settled or self._shift is None:
            return
        if self.groups == 1:
            upper = np.triu(self._xx[0])
            np.add(upper, np.triu(upper, 1).T, out=self._xx[0])
        self._settled = True
        self._move(self._sum / self.n)

    def _move(self, delta: Array) -> None:
        """Turn settled sums about the shift into sums about shift + delta, which is their mean."""
        assert self._shift is not None
        xx, xy, yy = self._outer(delta, self.n)
        self._xx -= xx
        self._xy -= xy
        self._yy = np.maximum(self._yy - yy, 0.0)
        self._shift = self._shift + delta
        self._sum[:] = 0.0

    def _outer(self, delta: Array, weight: float) -> tuple[Array, Array, Array]:
        """The xx, xy and yy of `weight` rows at delta (dx + dy,); xx exactly symmetric."""
        x, y = (part.reshape(self.groups, -1, 1) for part in (delta[: self.dx], delta[self.dx :]))
        xx, xy = x * x.swapaxes(1, 2), x * y.swapaxes(1, 2)
        xx *= weight
        xy *= weight
        return xx, xy, weight * delta[self.dx :] ** 2

    def stacked(self) -> tuple[Array, Array]:
        """Centered scatter by group: (groups, dx/groups, dx/groups) and (groups, dx/groups, dy/groups).

        The accumulators themselves: read them before the next `add`, and leave them unchanged.
        """
        self._settle()
        return self._xx, self._xy

    @property
    def xx(self) -> Array:
        """Centered scatter, sum over rows of (x - mean)(x - mean)^T: (dx, dx), or (groups, dx/groups,
        dx/groups)."""
        xx, _ = self.stacked()
        return xx[0] if self.groups == 1 else xx

    @property
    def xy(self) -> Array:
        """Centered cross scatter: (dx, dy), or (groups, dx/groups, dy/groups)."""
        _, xy = self.stacked()
        return xy[0] if self.groups == 1 else xy

    @property
    def yy(self) -> Array:
        """Centered sum of squares of each output, (dy,)."""
        self._settle()
        return self._yy

    @property
    def mean_x(self) -> Array:
        """Mean of x (dx,)."""
        return self._mean()[: self.dx]

    @property
    def mean_y(self) -> Array:
        """Mean of y (dy,)."""
        return self._mean()[self.dx :]

    def _mean(self) -> Array:
        self._settle()
        return np.zeros(self.dx + self.dy) if self._shift is None else self._shift

    def merge(self, other: Moments) -> None:
        """Take in all rows of `other`, which stays as it is (Chan, Golub and LeVeque 1979).

        Raises:
            ValueError: different sizes.
        """
        if (self.dx, self.dy, self.groups) != (other.dx, other.dy, other.groups):
            raise ValueError("moments of different sizes can't be merged")
        self.rounding = max(self.rounding, other.rounding)
        if not other.n:
            return
        mine, theirs = self._mean(), other._mean()
        total, delta = self.n + other.n, theirs - mine
        weight = self.n * other.n / total
        for scatter, others, between in zip(
            (self._xx, self._xy, self._yy),
            (other._xx, other._xy, other._yy),
            self._outer(delta, weight),
            strict=True,
        ):
            scatter += others
            scatter += between
        self._shift = mine + delta * (other.n / total) if self.n else theirs.copy()
        self.n = total

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows together."""
        both = Moments(self.dx, self.dy, self.groups)
        both.merge(self)
        both.merge(other)
        return both

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums and sizes as arrays (for `np.savez`, or another process); `from_state` restores them."""
        mean = self._mean()
        return {
            "sizes": np.array([self.dx, self.dy, self.groups]),
            "n": np.array(self.n),
            "rounding": np.array(self.rounding),
            "mean": mean.copy(),
            "xx": self._xx.copy(),
            "xy": self._xy.copy(),
            "yy": self._yy.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, npt.NDArray[Any]]) -> Moments:
        """The moments that `state` gave.

        Raises:
            KeyError, ValueError: not such a state.
        """
        moments = cls(*(int(size) for size in state["sizes"]))
        n, mean = float(state["n"]), np.array(state["mean"], dtype=np.float64)
        arrays = [np.array(state[key], dtype=np.float64, order="C") for key in ("xx", "xy", "yy")]
        wanted = [moments._sum.shape, *(a.shape for a in (moments._xx, moments._xy, moments._yy))]
        if [mean.shape, *(a.shape for a in arrays)] != wanted:
            raise ValueError("arrays don't fit the sizes they came with")
        moments._xx, moments._xy, moments._yy = arrays
        moments.n, moments._shift = n, mean if n else None
        moments.rounding = float(state["rounding"])
        return moments

    @property
    def variance(self) -> float:
        """Mean over rows of |y - mean(y)|^2, summed over outputs."""
        self._require_rows()
        return float(self.yy.sum()) / self.n

    def errors(self, affine: Affine) -> Array:
        """Mean over rows of the squared error of any affine map (its bias included), per output (dy,).

        Exact: the quadratic form in the moments, not an estimate. Its rounding is about 1e-15 of the variance
        times the squared weights in units of the best ones, so errors far below that can't be told from 0.

        Raises:
            NotApplicableError: no rows.
        """
        self._require_rows()
        xx, xy = self.stacked()
        stack = affine.weight.reshape(self.groups, -1, xx.shape[1])
        spread = self._yy + np.einsum("gqp,gqp->gq", stack, stack @ xx - 2.0 * xy.swapaxes(1, 2)).reshape(-1)
        mean = np.einsum("gqp,gp->gq", stack, self.mean_x.reshape(self.groups, -1)).reshape(-1)
        return np.maximum(spread, 0.0) / self.n + (mean + affine.bias - self.mean_y) ** 2

    def error(self, affine: Affine) -> float:
        """Mean over rows of |W x + b - y|^2, summed over outputs, for any affine map."""
        return float(self.errors(affine).sum())

    def relative_error(self, affine: Affine) -> float:
        """`error` as a share of `variance`. A target that never moves has no scale: 0 if it is met to
        rounding, else infinite."""
        error, variance = self.error(affine), self.variance
        rounding = (8 * np.finfo(np.float64).eps) ** 2 * float(self.mean_y @ self.mean_y)
        if variance > rounding:
            return error / variance
        return 0.0 if error <= rounding else float("inf")

    def _require_rows(self) -> None:
        if self.n <= 0:
            raise NotApplicableError("no calibration rows to measure on")


class _RowBuffer:
    """Rows that wait until they are enough for BLAS: shifted, and scaled by the roots of their weights."""

    def __init__(self, rows: int, shifts: tuple[Array, Array], dtype: type[np.floating[Any]]) -> None:
        """Nothing is in it yet.

        Args:
            rows: how many it holds.
            shifts: what is subtracted from rows of x (dx,) and of y (dy,).
            dtype: of the rows.
        """
        self._shifts = shifts
        self._x, self._y = (np.empty((rows, len(shift)), dtype) for shift in shifts)
        self._roots = np.empty(rows, dtype)
        self._filled = 0

    def fill(
        self, x: npt.NDArray[Any], y: npt.NDArray[Any], roots: Array | None
    ) -> Iterator[tuple[npt.NDArray[Any], ...]]:
        """Take in rows, and give back a full buffer whenever there is one: views, to be read at once.

        Args:
            x: (n, dx).
            y: (n, dy).
            roots: of the weights (n,), None where they are all 1.
        """
        done = 0
        while done < len(x):
            take = min(len(x) - done, len(self._roots) - self._filled)
            to, of = slice(self._filled, self._filled + take), slice(done, done + take)
            for buffer, rows, shift in zip((self._x, self._y), (x, y), self._shifts, strict=True):
                with np.errstate(invalid="ignore", over="ignore"):  # `solve` refuses what isn't finite
                    np.subtract(rows[of], shift, out=buffer[to], casting="same_kind")
                if roots is not None:
                    buffer[to] *= roots[of, None]
            self._roots[to] = 1.0 if roots is None else roots[of]
            self._filled, done = self._filled + take, done + take
            if self._filled == len(self._roots):
                yield self.drain()

    def drain(self) -> tuple[npt.NDArray[Any], ...]:
        """The rows of x and y and the roots of their weights, as views; the buffer is empty then."""
        filled, self._filled = self._filled, 0
        return self._x[:filled], self._y[:filled], self._roots[:filled]


def _weighted(
    x: npt.NDArray[Any], y: npt.NDArray[Any], weights: Array
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Array | None]:
    """Rows of positive weight, with the square roots of their weights (None where they are all 1)."""
    if weights.shape != (len(x),) or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"weights must be {len(x)} finite numbers, none below 0")
    present = weights > 0
    if not present.all():
        x, y, weights = x[present], y[present], weights[present]
    return x, y, None if (weights == 1).all() else np.sqrt(weights)


def _middle(rows: npt.NDArray[Any]) -> Array:
    """A point amid the rows: their mean, but where a column is constant its very value, so that it shifts to
    exact 0."""
    return np.where(
        rows.min(axis=0) == rows.max(axis=0), rows[0], rows.mean(axis=0, dtype=np.float64)
    ).astype(np.float64)


def add_patches(
    moments: Moments,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    positions: npt.NDArray[np.int64] | None,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> None:
    """Add a Conv's patches, and the target at the same positions, to moments.

    A bounded number of rows at a time: unfolded at once, a batch of full feature maps would be prod(kernel)
    times its size.

    Args:
        moments: of C * prod(kernel) inputs and C' outputs.
        x: (N, C, *spatial).
        y: the target (N, C', *output size).
        positions: flat output positions (N, P), None for all of them.
        kernel, strides, dilations, pads: as in `patches`.

    Raises:
        ValueError: the target's size isn't the Conv's.
    """
    if output_size(x.shape[2:], kernel, strides, dilations, pads) != y.shape[2:]:
        raise ValueError(f"target of size {y.shape[2:]} doesn't fit the geometry")
    if positions is None:
        size = prod(y.shape[2:])
        positions = np.broadcast_to(np.arange(size), (len(x), size))
    rows = max(1, _PATCH_ELEMENTS // moments.dx)
    columns = max(1, min(rows, positions.shape[1]))
    step = max(1, rows // columns)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        for first in range(0, positions.shape[1], columns):
            at = positions[part, first : first + columns]
            seen = patches(x[part], at, kernel=kernel, strides=strides, dilations=dilations, pads=pads)
            moments.add(seen, gather(y[part], at))
