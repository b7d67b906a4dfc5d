"""The moments of what the operators see that sum up over a group's channels: means and covariances of rows.

A covariance is there to be inverted. So it gets a ridge, relative to its mean diagonal: with fewer rows than
columns it would be singular, and every channel would seem to cost nothing. How large a ridge the rows ask for
says generalized cross-validation (Golub, Heath and Wahba 1979) of what the ridge is there for: to tell each
column by all the others. Rows of one sample are alike, and count as fewer than they are: as many independent
ones as would leave the moments of some samples as far from those of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from onnxfuse.channels.consumers import RowView
from onnxfuse.data.batch_rows import tensor_bytes
from onnxfuse.data.calibration import Batch, BatchStream
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.moments import Moments
from onnxfuse.numerics.sampling import RowSampler, output_size, patches, per_sample
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.memory import Budget, in_budget
from onnxfuse.runtime.observe import TappedModel, observe
from onnxfuse.runtime.session import Runtime

RIDGES = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Relative to the mean diagonal of a covariance."""

ENOUGH_ROWS = 16
"""With so many independent rows for each column the least ridge will do."""

SETTLED_ROWS = 2
"""With fewer independent rows for each column a view is not settled."""

STATISTICS_ROWS_PER_COLUMN = 16
LEAST_STATISTICS_ROWS = 4096

_CHUNK_ROWS = 4096
_BUDGET = Budget()


@dataclass(frozen=True)
class Statistics:
    """Moments of a view's columns, float64.

    Attributes:
        mean: of the columns (p,).
        covariance: (p, p), or variances (p,) where the columns are taken to be uncorrelated.
        ridge: relative to the mean of the covariance's diagonal.
        samples: how many the moments are of.
        rows: to how many independent rows their rows come.
    """

    mean: np.ndarray
    covariance: np.ndarray
    ridge: float
    samples: int
    rows: float = math.inf

    def variances(self) -> np.ndarray:
        """Variances of the columns (p,)."""
        return self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)

    @property
    def settled(self) -> bool:
        """Whether there are rows enough to tell the columns apart."""
        return self.covariance.ndim == 1 or self.rows >= SETTLED_ROWS * len(self.covariance)

    def ridged(self) -> np.ndarray:
        """The covariance (p, p) with the ridge on its diagonal."""
        found = self.covariance.copy()
        mean = float(np.trace(found)) / len(found)
        found.flat[:: len(found) + 1] += self.ridge * mean if mean > 0 else 1.0
        return found


@dataclass(frozen=True)
class Known:
    """Statistics by view, of all samples, and of those apart from the ones that trials are judged on."""

    every: Mapping[RowView, Statistics]
    apart: Mapping[RowView, Statistics]


def statistics(
    model: Model,
    views: Iterable[RowView],
    fit: BatchStream,
    runtime: Runtime,
    *,
    judged: BatchStream | None = None,
    seed: int = 0,
    mask: str | None = None,
    budget: Budget = _BUDGET,
    progress: Progress | None = None,
) -> Known:
    """Statistics of the views, from one run over the samples, or several where they tap more than fits into
    memory; a view of no tensor has none.

    Args:
        model: the views' own.
        views: the rows to look at.
        fit: the samples.
        runtime: runs the model; its threads are BLAS's too.
        judged: more samples, those that trials are judged on.
        seed: of the sampled positions.
        mask: a graph input that is 0 where a token is padding; those rows are left out of token views.
        budget: of memory.
        progress: told of every batch.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    parts = [fit] if judged is None else [fit, judged]
    samples = sum(part.samples for part in parts)
    wanted = [_Gathering(view, samples, seed, mask) for view in dict.fromkeys(views) if view.tensor]
    if not wanted:
        return Known({}, {})
    sizes = tensor_bytes(model, next(iter(fit)).feed, runtime)

    def taps(item: _Gathering) -> dict[str, int]:
        return {item.view.tensor: sizes.get(item.view.tensor, 0)}

    runs = list(in_budget(wanted, taps, budget.taps))
    advance = (progress or NoProgress()).task("calibrating", total=len(runs) * sum(map(len, parts)))
    with threadpool_limits(runtime.threads, "blas"):
        for run in runs:
            tapped = TappedModel(model, [item.view.tensor for item in run], runtime)
            for number, part in enumerate(parts):
                observe(tapped, part, [partial(item.add, part=number) for item in run], advance)
    found = {item.view: item.result([part.samples for part in parts]) for item in wanted}
    return Known(*({view: own[place] for view, own in found.items()} for place in range(2)))


class _Gathering:
    """The moments of one view, summed batch by batch."""

    def __init__(self, view: RowView, samples: int, seed: int, mask: str | None) -> None:
        self.view = view
        self.sampler = RowSampler(seed, f"{view.tensor} {view.kernel}", mask if view.token else None)
        rows = max(LEAST_STATISTICS_ROWS, STATISTICS_ROWS_PER_COLUMN * view.columns)
        self.positions = per_sample(rows, max(samples, 1))
        # Of uncorrelated columns only the spread of each is wanted, which is what a target's moments are.
        sizes = (view.columns, view.groups, view.groups) if view.correlated else (1, view.columns, 1)
        self.moments = [Moments(*sizes, single=True) for _ in range(2)]

    def add(self, batch: Batch, found: Feed, *, part: int) -> None:
        """Take in one batch's rows.

        Args:
            batch: the batch.
            found: the tensors by name.
            part: 1 where trials are judged on its samples, else 0.
        """
        rows, weights = self._rows(found, batch.index)
        for start in range(0, len(rows), _CHUNK_ROWS):
            chunk = slice(start, start + _CHUNK_ROWS)
            own = rows[chunk]
            blank = np.zeros((len(own), self.view.groups if self.view.correlated else 1), np.float32)
            pair = (own, blank) if self.view.correlated else (blank, own)
            self.moments[part].add(pair[0], pair[1], None if weights is None else weights[chunk])

    def _rows(self, found: Feed, batch: int) -> tuple[np.ndarray, np.ndarray | None]:
        view, x = self.view, found[self.view.tensor]
        if view.kernel:
            geometry = {
                "kernel": view.kernel,
                "strides": view.strides,
                "dilations": view.dilations,
                "pads": view.pads,
            }
            shape = (len(x), *output_size(x.shape[2:], **geometry))
            rows = self.sampler.sample(batch, shape, self.positions, found)
            return patches(x, rows.positions, **geometry), None
        x = np.moveaxis(x, view.axis, -1)
        if x.ndim == 1:
            x = x[None]
        rows = self.sampler.sample(batch, x.shape[:-1], self.positions, found)
        return rows.vectors(x, -1), rows.weights

    def result(self, samples: Sequence[int]) -> tuple[Statistics, Statistics]:
        """Statistics of all samples, and of those apart from the ones that trials are judged on.

        Args:
            samples: how many there are of the one kind and of the other.
        """
        apart, every = self.moments
        if not every.n:
            found = Statistics(*_normalized(apart, self.view), RIDGES[0], samples[0])
            return found, found
        own, judged = (_normalized(own, self.view) for own in self.moments)
        count = apart.n
        every.merge(apart)
        mean, covariance = _normalized(every, self.view)
        total, rows, ridge = sum(samples), math.inf, RIDGES[0]
        if self.view.correlated:
            rows = _independent_rows(covariance, own[1] - judged[1], samples)
            ridge = _ridge(own[1], min(rows * samples[0] / total, count) - 1)
        return (
            Statistics(mean, covariance, ridge, total, rows),
            Statistics(*own, ridge, samples[0], rows * samples[0] / total),
        )


def _normalized(moments: Moments, view: RowView) -> tuple[np.ndarray, np.ndarray]:
    """Means (p,), and covariance (p, p) or variances (p,)."""
    count = max(moments.n, 1.0)
    if not view.correlated:
        return moments.mean_y.copy(), moments.yy / count
    stack = moments.stacked()[0] / count
    if view.groups == 1:
        return moments.mean_x.copy(), stack[0]
    wide = np.zeros((view.groups, stack.shape[1], view.groups, stack.shape[1]))
    every = np.arange(view.groups)
    wide[every, :, every] = stack
    return moments.mean_x.copy(), wide.reshape(view.columns, view.columns)


def _independent_rows(covariance: np.ndarray, apart: np.ndarray, samples: Sequence[int]) -> float:
    """The number of independent normal rows whose covariances would be as far apart as those of two sets of
    samples are.

    Args:
        covariance: (p, p) of all samples.
        apart: the difference between the covariances of the two sets.
        samples: in each set.
    """
    noise = float(np.vdot(apart, apart)) / (1 / samples[0] + 1 / samples[1])  # of one sample
    each = float(np.trace(covariance)) ** 2 + float(np.vdot(covariance, covariance))  # of one row
    return sum(samples) * each / noise if noise > 0 else math.inf


def _ridge(covariance: np.ndarray, rows: float) -> float:
    """The ridge with which each column is told best by the others, by generalized cross-validation.

    Args:
        covariance: (p, p) of the rows.
        rows: how many independent ones there were, but for the one that went into their mean.
    """
    size = len(covariance)
    scale = float(np.trace(covariance)) / size
    if rows > ENOUGH_ROWS * size or not np.isfinite(scale) or scale <= 0:
        return RIDGES[0]
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0.0)
    squares = vectors**2
    errors = []
    for ridge in RIDGES:
        shrunk = 1.0 / (values + ridge * scale)
        left = squares @ (values * shrunk**2) / (squares @ shrunk) ** 2  # mean square of what isn't told
        free = 1.0 - float((values * shrunk).sum()) / rows
        errors.append(float(left.sum()) / free**2 if free > 0 else math.inf)
    return RIDGES[int(np.argmin(errors))] if np.isfinite(errors).any() else RIDGES[-1]
