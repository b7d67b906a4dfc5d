"""A matrix as a product of two thin ones, and how much rank each of many matrices is worth.

y = W x + b is computed by way of r numbers, y = A (B x) + b'. With U an orthonormal basis of r directions of
y, A = U and B = U^T W is the best that can be had from them, so all that is to be chosen is U:

- **svd**: the leading left singular vectors of W, which leave the least |W - A B|_F (Eckart and Young 1936).
- **randomized**: nearly the same from a few products with W (Halko, Martinsson, Tropp 2011, algorithm 4.4).
- **data**: what leaves the least E|(W - A B)(x - mean x)|^2, reduced-rank regression (Izenman 1975) with W x
  itself for its target. By Eckart and Young in the whitened space that is the SVD of W C^1/2, C the
  covariance of x, whose left singular vectors are the eigenvectors of W C W^T: of the covariance of the
  *outputs*. So nothing of x has to be observed, no patches either. b' = b + (W - A B) mean x takes the part
  of the means.

**Ranks.** A direction is worth the share of its matrix's energy that is lost with it, and costs what an
output and a column more cost. Shares of all matrices together are given up in the order of loss per cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnxfuse.numerics.affine import Array

POWER = 3
"""Power iterations of the randomized SVD: trained weights have spectra that fall off slowly."""

OVERSAMPLING = 10

RIDGE = 1e-3
"""Share of the outputs' energy in which inputs count as if they were uncorrelated and alike: what few samples
don't show is then no free choice."""


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions (out, k) of a matrix's outputs, the best first, the energy (k,) of each and that
    of all that there are."""

    directions: Array
    energy: Array
    total: float

    def lost(self) -> Array:
        """(k + 1,): the share of the energy that is lost where so many directions are kept."""
        if not self.total > 0:
            return np.zeros(len(self.energy) + 1)
        left = self.total - np.concatenate([[0.0], np.cumsum(self.energy)])
        return np.maximum(left, 0.0) / self.total

    def factors(self, weight: Array, rank: int) -> tuple[Array, Array]:
        """A (out, rank) and B (rank, columns), A B the projection of `weight`; of a direction, the column of
        A and the row of B are of one length, so that neither overflows a small type."""
        left = self.directions[:, :rank]
        right = left.T @ weight
        length = np.sqrt(np.linalg.norm(right, axis=1))
        length[length == 0] = 1.0
        return left * length, right / length[:, None]


def truncated(weight: Array) -> Basis:
    """The basis of the SVD of a weight (out, columns)."""
    left, values, _ = scipy.linalg.svd(weight, full_matrices=False)
    return Basis(left, values**2, float(np.vdot(weight, weight)))


def randomized(weight: Array, rank: int, seed: int) -> Basis:
    """Nearly the basis of the SVD (module docstring).

    Args:
        weight: (out, columns).
        rank: number of directions at most.
        seed: of the random start.
    """
    random = np.random.default_rng(seed)
    width = min(rank + OVERSAMPLING, *weight.shape)
    span = np.linalg.qr(weight @ random.standard_normal((weight.shape[1], width)))[0]
    for _ in range(POWER):
        span = np.linalg.qr(weight @ np.linalg.qr(weight.T @ span)[0])[0]
    left, values, _ = scipy.linalg.svd(span.T @ weight, full_matrices=False)
    return Basis((span @ left)[:, :rank], values[:rank] ** 2, float(np.vdot(weight, weight)))


def reduced_rank(weight: Array, covariance: Array, ridge: float = RIDGE) -> Basis:
    """The basis of reduced-rank regression.

    Args:
        weight: (out, columns).
        covariance: (out, out): that of the outputs, W C W^T.
        ridge: see `RIDGE`.
    """
    size = float(np.vdot(weight, weight))
    energy = float(np.trace(covariance))
    scale = ridge * energy / size if size > 0 else 0.0
    values, vectors = np.linalg.eigh(covariance + scale * (weight @ weight.T))
    count = min(weight.shape)
    values = np.maximum(values[::-1][:count], 0.0)
    return Basis(np.ascontiguousarray(vectors[:, ::-1][:, :count]), values, float(values.sum()))


def allocate(
    lost: Sequence[Array], unit: Sequence[float], full: Sequence[float], saving: float
) -> list[int | None] | None:
    """The rank of each matrix, None where it stays whole, such that together at least `saving` is saved for
    little loss; None where that can't be.

    Args:
        lost: of each, the share of energy lost at rank 0, 1, ...: convex.
        unit: of each, the cost of a rank.
        full: of each, the cost of the whole.

    Of one matrix, loss against saving is convex but for the first step, to a rank at which anything is saved
    at all: that goes at once to where a straight line from nothing touches the curve. What remains are steps
    of ever greater loss per saving, of all matrices in one order.
    """
    slopes: list[Array] = []
    gains: list[Array] = []
    owners: list[npt.NDArray[np.int64]] = []
    ranks: list[npt.NDArray[np.int64]] = []
    for index, (own, each, whole) in enumerate(zip(lost, unit, full, strict=True)):
        rank = np.arange(len(own) - 1, 0, -1)
        rank = rank[rank * each < whole]
        if not len(rank):
            continue
        saved = whole - rank * each
        first = int(np.argmin(own[rank] / saved))
        steps = np.diff(np.concatenate([[0.0], saved[first:]]))
        losses = np.diff(np.concatenate([[0.0], own[rank[first:]]]))
        slopes.append(np.maximum.accumulate(losses / steps))
        gains.append(steps)
        owners.append(np.full(len(steps), index))
        ranks.append(rank[first:])
    found: list[int | None] = [None] * len(lost)
    if saving <= 0:
        return found
    if not slopes:
        return None
    order = np.argsort(np.concatenate(slopes), kind="stable")
    total = np.cumsum(np.concatenate(gains)[order])
    count = int(np.searchsorted(total, saving * (1 - 1e-12))) + 1
    if count > len(total):
        return None
    owner = np.concatenate(owners)[order[:count]].tolist()
    reached = np.concatenate(ranks)[order[:count]].tolist()
    for index, rank_now in zip(owner, reached, strict=True):
        found[index] = rank_now  # the last one is the smallest
    # The last step may save more than is asked for.
    last, spare = owner[-1], float(total[count - 1]) - saving
    room = math.floor(spare / unit[last] + 1e-9)
    found[last] = min(reached[-1] + max(room, 0), len(lost[last]) - 1)
    return found
