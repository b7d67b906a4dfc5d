"""Distances between two weight matrices, and the rows of one that stand for those of the other.

A row is a neuron: its incoming weights are a point in the space of the columns, and a layer is the cloud of
its rows (Layer Fusion, O'Neill et al. 2020). With S = W^T W / n the second moment of n rows, and mean and
covariance of the rows m and C:

    euclidean     |A - B|_F
    covariance    1 - cos(S_A, S_B)                                                    (2)
    kl            mean of KL(A || B) and KL(B || A), Gaussians of mean zero            (3), with its -d
    wasserstein   |m_A - m_B|^2 + tr C_A + tr C_B - 2 tr (C_A^1/2 C_B C_A^1/2)^1/2     (5), its root
    aligned       mean |a_i - b_p(i)|^2 over rows under the best permutation p         (4), its root
    centroids     the same between k-means centroids with their masses, by optimal transport

Print lacks the -d of (3) and the root inside the last term of (5). The trace there is the nuclear norm of
X Y^T for any X^T X = C_A and Y^T Y = C_B, and where X and Y have equally many rows, the three traces together
are min |X - U Y|_F^2 over orthogonal U: one SVD, no root of a matrix, nothing to invert, and no cancellation
where layers are alike.

`distance` makes these comparable between pairs of any size:

    euclidean, wasserstein, aligned, centroids: divided by the root of the two mean squared row norms' sum, so
        between 0 and sqrt(2), at 1 where layers have nothing to do with each other; of one pair of matrices
        wasserstein <= aligned <= euclidean;
    covariance: is between 0 and 1 by itself;
    kl: nats per column, at least 0. Both moments get a ridge, `RIDGE` times the mean variance: without it a
        matrix with fewer rows than columns would be infinitely far from most others.

All but covariance, which knows no scale, are unchanged by a common factor on both matrices. All are unchanged
by a common rotation of the columns; all but euclidean by any order of the rows; covariance and kl even by
rotations of the rows. Between zero matrices all are 0; covariance is 1 between a zero matrix and another.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import scipy.cluster.vq
import scipy.linalg
import scipy.optimize
import scipy.spatial.distance

from onnxfuse.numerics.affine import Array

Criterion = Literal["euclidean", "covariance", "kl", "wasserstein", "aligned", "centroids"]

CRITERIA: tuple[Criterion, ...] = get_args(Criterion)

RIDGE = 1e-3
"""Added to the variances of Gaussians that are compared by `kl`, as a share of the mean variance of both."""

CENTROIDS = 16
"""The most centroids that stand for the rows of a matrix."""

_EQUAL_ROWS = ("euclidean", "aligned")


def needs_equal_rows(criterion: Criterion) -> bool:
    """Whether it compares row by row, and so needs equally many; all need equally many columns."""
    return criterion in _EQUAL_ROWS


def distance(a: npt.ArrayLike, b: npt.ArrayLike, criterion: Criterion, seed: int = 0) -> float:
    """The distance of two matrices: 0 for a matrix and itself, symmetric, comparable between pairs.

    Args:
        a, b: (rows, columns).
        criterion: one of `CRITERIA`.
        seed: of k-means.

    Raises:
        ValueError: shapes that the criterion can't compare, no entries, or entries that are not finite.
    """
    a, b = _matrices(a, b, equal_rows=needs_equal_rows(criterion))
    match criterion:
        case "covariance":
            return covariance(a, b)
        case "kl":
            return (divergence(a, b) + divergence(b, a)) / 2 / a.shape[1]
        case "euclidean":
            raw = euclidean(a, b) / math.sqrt(len(a))
        case "wasserstein":
            raw = wasserstein(a, b)
        case "aligned":
            raw = aligned(a, b)
        case "centroids":
            raw = centroids(a, b, seed)
        case _:
            raise ValueError(f"'{criterion}' is none of {', '.join(CRITERIA)}")
    scale = math.hypot(_root_mean_square(a), _root_mean_square(b))
    return raw / scale if scale > 0 else 0.0


def euclidean(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """|A - B|_F, for equal shapes. ValueError as in `distance`."""
    a, b = _matrices(a, b, equal_rows=True)
    return float(np.linalg.norm(a - b))


def covariance(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """One minus the cosine (2) of the second moments of the rows; about zero, as print has E[W] = 0.
    ValueError as in `distance`."""
    a, b = _matrices(a, b)
    norms = math.sqrt(_inner(a, a)) * math.sqrt(_inner(b, b))
    if norms == 0:
        return 0.0 if a.any() == b.any() else 1.0
    return min(max(1 - _inner(a, b) / norms, 0.0), 1.0)


def divergence(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """KL(A || B) in nats between Gaussians of mean zero with the rows' second moments, both with the ridge:
    (3) with the -d that makes it 0 for equal ones. ValueError as in `distance`."""
    first, second = _moments(*_matrices(a, b))
    if not first.any() and not second.any():
        return 0.0
    factor = scipy.linalg.cho_factor(second, lower=True)
    trace = float(np.trace(scipy.linalg.cho_solve(factor, first)))
    return max((trace - len(first) - _log_determinant(first) + _log_determinant(second)) / 2, 0.0)


def wasserstein(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The 2-Wasserstein distance (5) of Gaussians with the rows' means and covariances. ValueError as in
    `distance`."""
    a, b = _matrices(a, b)
    x, y = _root_of_covariance(a), _root_of_covariance(b)
    size = max(len(x), len(y))
    x, y = (np.pad(root, ((0, size - len(root)), (0, 0))) for root in (x, y))
    return math.hypot(np.linalg.norm(a.mean(0) - b.mean(0)), np.linalg.norm(x - rotation(x, y) @ y))


def aligned(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The 2-Wasserstein distance (4) of the rows as two sets of equally heavy points. ValueError as in
    `distance`."""
    a, b = _matrices(a, b, equal_rows=True)
    return _root_mean_square(a - b[alignment(a, b)])


def centroids(a: npt.ArrayLike, b: npt.ArrayLike, seed: int = 0) -> float:
    """The 2-Wasserstein distance of the k-means centroids of the rows, each as heavy as its share of them.

    At most `CENTROIDS` different rows stand for themselves, and the distance is that of the rows.

    Args:
        a, b: (rows, columns).
        seed: of k-means.

    Raises:
        ValueError: as in `distance`.
    """
    a, b = _matrices(a, b)
    (x, mass_x), (y, mass_y) = (_quantized(rows, seed) for rows in (a, b))
    costs = scipy.spatial.distance.cdist(x, y, "sqeuclidean")
    highest = float(costs.max())
    if highest == 0:
        return 0.0
    if len(x) == len(y) and np.ptp(mass_x) == np.ptp(mass_y) == 0:
        # One to one, and exact: the root would show a linear program's tolerance.
        rows, columns = scipy.optimize.linear_sum_assignment(costs)
        return math.sqrt(float(costs[rows, columns].mean()))
    leaves = np.kron(np.eye(len(x)), np.ones(len(y)))
    arrives = np.kron(np.ones(len(x)), np.eye(len(y)))
    # The masses sum to one on both sides: one of the conditions follows from the others.
    flow = scipy.optimize.linprog(
        costs.reshape(-1) / highest,
        A_eq=np.vstack([leaves, arrives[1:]]),
        b_eq=np.concatenate([mass_x, mass_y[1:]]),
        method="highs-ds",
    )
    if flow.x is None:
        raise RuntimeError(f"optimal transport: {flow.message}")
    return math.sqrt(max(float(np.vdot(flow.x, costs)), 0.0))


def alignment(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """The permutation p (rows,) that minimizes the sum of |a[i] - b[p[i]]|^2. ValueError as in `distance`."""
    a, b = _matrices(a, b, equal_rows=True)
    return np.asarray(scipy.optimize.linear_sum_assignment(a @ b.T, maximize=True)[1])


def rotation(a: npt.ArrayLike, b: npt.ArrayLike) -> Array:
    """The orthogonal U (rows, rows) that minimizes |A - U B|_F. ValueError as in `distance`."""
    a, b = _matrices(a, b, equal_rows=True)
    left, _, right = np.linalg.svd(a @ b.T)
    return left @ right


def freeze_share(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """gamma of (6): the share of the shared gradient that is the first layer's; in [0, 1].

    Half the sum of KL(A || M) and KL(B || M), with M the Gaussian that has the moments of the mixture of
    both: (ln|S_M| - (ln|S_A| + ln|S_B|) / 2) / 2. In nats per column, with `divergence`'s ridge, and cut at
    1: summed over the columns, as print has it, nearly any two layers of a real network are beyond 1. Layers
    that are the same have 0. ValueError as in `distance`.
    """
    a, b = _matrices(a, b)
    first, second = _moments(a, b)
    if not first.any() and not second.any():
        return 0.0
    logs = [_log_determinant(moments) for moments in ((first + second) / 2, first, second)]
    return min(max((logs[0] - (logs[1] + logs[2]) / 2) / 2 / a.shape[1], 0.0), 1.0)


def _matrices(a: npt.ArrayLike, b: npt.ArrayLike, *, equal_rows: bool = False) -> tuple[Array, Array]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for matrix in (first, second):
        if matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"an array of shape {matrix.shape} is not a matrix with entries")
        if not np.isfinite(matrix).all():
            raise ValueError("weights are not finite")
    for axis, what in ((1, "columns"), (0, "rows")):
        if first.shape[axis] != second.shape[axis] and (axis or equal_rows):
            raise ValueError(f"{first.shape[axis]} and {second.shape[axis]} {what} can't be compared")
    return first, second


def _root_mean_square(rows: Array) -> float:
    """The root mean square of the norms of the rows."""
    return float(np.linalg.norm(rows)) / math.sqrt(len(rows))


def _inner(a: Array, b: Array) -> float:
    """tr(S_A S_B), through the smaller of rows and columns."""
    if len(a) * len(b) <= a.shape[1] ** 2:
        return float(np.sum((a @ b.T) ** 2)) / (len(a) * len(b))
    return float(np.sum((a.T @ a) * (b.T @ b))) / (len(a) * len(b))


def _moments(a: Array, b: Array) -> tuple[Array, Array]:
    """Second moments of the rows with the ridge, in the space that the rows of both span: outside it both
    are the ridge alone, and say nothing about each other."""
    columns = a.shape[1]
    if len(a) + len(b) < columns:
        spanned = _triangle(np.vstack([a, b]).T).T
        a, b = spanned[: len(a)], spanned[len(a) :]
    first, second = a.T @ a / len(a), b.T @ b / len(b)
    ridge = RIDGE * (np.trace(first) + np.trace(second)) / 2 / columns * np.eye(len(first))
    return first + ridge, second + ridge


def _log_determinant(moments: Array) -> float:
    return float(np.linalg.slogdet(moments)[1])


def _triangle(matrix: Array) -> Array:
    """R (columns, columns) of a tall matrix Q R."""
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _root_of_covariance(rows: Array) -> Array:
    """X with X^T X the covariance of the rows, of at most as many rows as columns."""
    centered = (rows - rows.mean(0)) / math.sqrt(len(rows))
    return _triangle(centered) if len(rows) > rows.shape[1] else centered


def _quantized(rows: Array, seed: int) -> tuple[Array, Array]:
    """Centroids (k, columns) and their masses (k,), whatever the order of the rows."""
    points, counts = np.unique(rows, axis=0, return_counts=True)
    if len(points) <= CENTROIDS:
        return points, counts / len(rows)
    # k-means starts from rows by their places. Norms order them alike when the columns are rotated.
    order = np.argsort(np.linalg.norm(points, axis=1), kind="stable")
    points = np.repeat(points[order], counts[order], axis=0)
    _, labels = scipy.cluster.vq.kmeans2(points, CENTROIDS, iter=50, minit="++", seed=seed, missing="warn")
    clusters = [points[labels == label] for label in np.unique(labels)]
    return np.stack([c.mean(0) for c in clusters]), np.array([len(c) for c in clusters]) / len(rows)
