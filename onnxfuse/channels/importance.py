"""Which channels of a group can go, judged by those who read them, and how those make up for it.

A consumer y = W x that loses the columns B of x, and changes its other columns as is best for y in mean
square, is off by

    tr(W_B [(H^-1)_BB]^-1 W_B^T),        H the covariance of x,

and its best other columns are W - W_B [(H^-1)_BB]^-1 (H^-1)_B: (optimal brain surgeon, Hassibi and Stork
1993, for a block of columns). A channel's cost is the sum of that over all consumers of its group, each
relative to the variance of its own output. The cheapest channel goes first; then H^-1 of what is left
follows by one block of Gaussian elimination, so that of two channels which say the same only one is cheap
to lose.

H gets a small ridge, relative to its mean diagonal: with fewer rows than columns it would be singular, and
every channel would seem to cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from onnxfuse.channels.consumers import Consumer, RowView
from onnxfuse.channels.groups import Group
from onnxfuse.data.batch_rows import tensor_bytes
from onnxfuse.data.calibration import Batch, BatchStream
from onnxfuse.ir.model import Feed, Model
from onnxfuse.numerics.moments import Moments
from onnxfuse.numerics.sampling import RowSampler, output_size, patches, per_sample
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.memory import Budget, in_budget
from onnxfuse.runtime.observe import TappedModel, observe
from onnxfuse.runtime.session import Runtime

COVARIANCE_RIDGE = 1e-2
"""Relative to the mean diagonal of a covariance."""

STATISTICS_ROWS_PER_COLUMN = 16
LEAST_STATISTICS_ROWS = 4096

_CHUNK_ROWS = 4096
_BUDGET = Budget()
_STEPS = 256  # a group loses at least one in this many channels at a time


@dataclass(frozen=True)
class Statistics:
    """Moments of a view's columns, float64: means (p,); covariance (p, p), or variances (p,) where the
    columns are taken to be uncorrelated."""

    mean: np.ndarray
    covariance: np.ndarray

    def variances(self) -> np.ndarray:
        """Variances of the columns (p,)."""
        return self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)

    def ridged(self) -> np.ndarray:
        """The covariance (p, p) with the ridge on its diagonal."""
        found = self.covariance.copy()
        mean = float(np.trace(found)) / len(found)
        found.flat[:: len(found) + 1] += COVARIANCE_RIDGE * mean if mean > 0 else 1.0
        return found


# Gathering ----------------------------------------------------------------------------------------


def statistics(
    model: Model,
    views: Iterable[RowView],
    batches: BatchStream,
    runtime: Runtime,
    *,
    seed: int = 0,
    mask: str | None = None,
    budget: Budget = _BUDGET,
    progress: Progress | None = None,
) -> dict[RowView, Statistics]:
    """Statistics of the views, from one run over the samples, or several where they tap more than fits into
    memory; a view of no tensor has none.

    Args:
        model: the views' own.
        views: the rows to look at.
        batches: the samples.
        runtime: runs the model; its threads are BLAS's too.
        seed: of the sampled positions.
        mask: a graph input that is 0 where a token is padding; those rows are left out of token views.
        budget: of memory.
        progress: told of every batch.

    Raises:
        InputError: bad samples.
        NotApplicableError: activations that are not finite.
    """
    wanted = [_Gathering(view, batches, seed, mask) for view in dict.fromkeys(views) if view.tensor]
    if not wanted:
        return {}
    sizes = tensor_bytes(model, next(batches.feeds()), runtime)

    def taps(item: _Gathering) -> dict[str, int]:
        return {item.view.tensor: sizes.get(item.view.tensor, 0)}

    parts = list(in_budget(wanted, taps, budget.taps))
    advance = (progress or NoProgress()).task("calibrating", total=len(parts) * len(batches))
    with threadpool_limits(runtime.threads, "blas"):
        for part in parts:
            tapped = TappedModel(model, [item.view.tensor for item in part], runtime)
            observe(tapped, batches, [item.add for item in part], advance)
    return {item.view: item.result() for item in wanted}


class _Gathering:
    """The moments of one view, summed batch by batch."""

    def __init__(self, view: RowView, batches: BatchStream, seed: int, mask: str | None) -> None:
        self.view = view
        self.sampler = RowSampler(seed, f"{view.tensor} {view.kernel}", mask if view.token else None)
        rows = max(LEAST_STATISTICS_ROWS, STATISTICS_ROWS_PER_COLUMN * view.columns)
        self.positions = per_sample(rows, max(batches.samples, 1))
        # Of uncorrelated columns only the spread of each is wanted, which is what a target's moments are.
        sizes = (view.columns, view.groups, view.groups) if view.correlated else (1, view.columns, 1)
        self.moments = Moments(*sizes, single=True)

    def add(self, batch: Batch, found: Feed) -> None:
        """Take in one batch's rows."""
        rows, weights = self._rows(found, batch.index)
        for start in range(0, len(rows), _CHUNK_ROWS):
            part = slice(start, start + _CHUNK_ROWS)
            own = rows[part]
            blank = np.zeros((len(own), self.view.groups if self.view.correlated else 1), np.float32)
            pair = (own, blank) if self.view.correlated else (blank, own)
            self.moments.add(pair[0], pair[1], None if weights is None else weights[part])

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

    def result(self) -> Statistics:
        moments, view = self.moments, self.view
        if not view.correlated:
            return Statistics(moments.mean_y.copy(), moments.yy / max(moments.n, 1.0))
        stack = moments.stacked()[0] / max(moments.n, 1.0)
        if view.groups == 1:
            return Statistics(moments.mean_x.copy(), stack[0].copy())
        wide = np.zeros((view.groups, stack.shape[1], view.groups, stack.shape[1]))
        every = np.arange(view.groups)
        wide[every, :, every] = stack
        return Statistics(moments.mean_x.copy(), wide.reshape(view.columns, view.columns))


# Ranking ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The order in which a group's channels go.

    Attributes:
        order: int64 (size,), the first to go first.
        cost: float64 (size + 1,): the errors of the consumers when so many are lost, relative to the
            variance of each one's output, summed up.
        idle: the number of channels at the front of `order` that carry nothing on the samples.
    """

    order: np.ndarray
    cost: np.ndarray
    idle: int

    def kept(self, count: int) -> np.ndarray:
        """The channels that stay when `count` do, in their own order."""
        return np.sort(self.order[len(self.order) - count :])


class _Part:
    """One consumer, as its columns go."""

    def __init__(self, consumer: Consumer, model: Model, found: Statistics | None) -> None:
        self.places = consumer.places
        matrix = consumer.matrix(model)
        size = consumer.view.columns
        given = found if found is not None else Statistics(np.zeros(size), np.ones(size))
        self.static: np.ndarray | None = None
        self.idle = np.zeros(len(self.places), bool)
        if found is not None:
            silent = (given.variances() == 0) & (given.mean == 0)
            self.idle = silent[self.places].all(axis=1)
        if given.covariance.ndim == 1 or matrix is None:
            # Without W a sum is taken as it is, mean included; with it a bias makes up for means.
            energy = given.variances() + (given.mean**2 if matrix is None else 0.0)
            if matrix is not None:
                energy = energy * (matrix**2).sum(axis=0)
            total = float(energy.sum())
            self.static = energy[self.places].sum(axis=1) / total if total > 0 else np.zeros(len(self.places))
            return
        variance = float(np.einsum("op,op->", matrix, matrix @ given.covariance))
        self.scale = 1.0 / variance if variance > 0 else 0.0
        self.weight = matrix
        self.inverse = np.linalg.inv(given.ridged())

    def costs(self, channels: np.ndarray) -> np.ndarray:
        """The cost of losing each of these channels next."""
        if self.static is not None:
            return self.static[channels]
        at = self.places[channels]
        blocks = self.inverse[at[:, :, None], at[:, None, :]]
        weights = self.weight.T[at]  # (channels, columns of each, outputs)
        return self.scale * np.einsum("cmo,cmo->c", weights, np.linalg.solve(blocks, weights))

    def lose(self, channels: np.ndarray) -> float:
        """The cost of losing these channels, which are taken out."""
        if self.static is not None:
            return float(self.static[channels].sum())
        at = self.places[channels].reshape(-1)
        rows, weights = self.inverse[at], self.weight[:, at]
        solved = np.linalg.solve(rows[:, at], np.hstack([rows, weights.T]))
        gain = solved[:, : rows.shape[1]]  # [(H^-1)_BB]^-1 (H^-1)_B:
        cost = self.scale * float(np.einsum("ob,bo->", weights, solved[:, rows.shape[1] :]))
        self.weight = self.weight - weights @ gain
        self.inverse -= rows.T @ gain
        # What is gone must not come back as rounding.
        self.weight[:, at] = 0.0
        self.inverse[at] = 0.0
        self.inverse[:, at] = 0.0
        self.inverse[at, at] = 1.0
        return max(cost, 0.0)


def rank(
    model: Model,
    size: int,
    consumers: Sequence[Consumer],
    found: Mapping[RowView, Statistics],
    *,
    first: np.ndarray | None = None,
    least: int = 1,
) -> Ranking:
    """The ranking of a group's channels by what losing them costs its consumers.

    Args:
        model: the group's own.
        size: the number of channels.
        consumers: all operators that sum up over them.
        found: statistics of the consumers' views; a view without any counts by its weights alone.
        first: channels that go before all others.
        least: that many stay in any case; their order is by their cost at that point.
    """
    parts = [_Part(consumer, model, found.get(consumer.view)) for consumer in consumers]
    idle = np.ones(size, bool)
    for part in parts:
        idle &= part.idle
    known = np.zeros(size, bool) if first is None else np.isin(np.arange(size), first)
    ahead = np.flatnonzero(known | (idle if parts else known))
    alive = np.ones(size, bool)
    order: list[int] = []
    cost = [0.0]

    def lose(channels: np.ndarray) -> None:
        total = sum(part.lose(channels) for part in parts)
        cost.extend(cost[-1] + total * (i + 1) / len(channels) for i in range(len(channels)))
        order.extend(channels.tolist())
        alive[channels] = False

    ahead = ahead[np.argsort(~known[ahead], kind="stable")][: max(size - least, int(known.sum()))]
    if len(ahead):
        lose(ahead)
    step = max(1, size // _STEPS)
    while (left := int(alive.sum())) > least:
        channels = np.flatnonzero(alive)
        costs = sum((part.costs(channels) for part in parts), np.zeros(len(channels)))
        lose(channels[np.argsort(costs, kind="stable")[: min(step, left - least)]])
    rest = np.flatnonzero(alive)
    costs = sum((part.costs(rest) for part in parts), np.zeros(len(rest)))
    order.extend(rest[np.argsort(costs, kind="stable")].tolist())
    cost.extend([cost[-1]] * len(rest))
    return Ranking(np.array(order, np.int64), np.array(cost), len(ahead))


def magnitudes(model: Model, group: Group, *, first: np.ndarray) -> Ranking:
    """The ranking of a group's channels by the squares of the weights that make and read them.

    Args:
        model: the group's own.
        group: the group. The squares in each of its tensors are taken relative to all of that tensor's.
        first: channels that go before all others.
    """
    total = np.zeros(group.size)
    for touch in group.touches:
        if "producer" in touch.roles or "consumer" in touch.roles:
            value = model.weight(model.tensor(touch.weight))
            assert value is not None
            rows = np.moveaxis(value, touch.axis, 0).astype(np.float64)[touch.map].reshape(group.size, -1)
            squares = (rows**2).sum(axis=1)
            total += squares / max(float(squares.sum()), np.finfo(np.float64).tiny)
    order = np.argsort(total, kind="stable")
    order = np.concatenate([first, order[~np.isin(order, first)]]).astype(np.int64)
    return Ranking(order, np.concatenate([[0.0], np.cumsum(total[order])]), len(first))


# Making up for it ---------------------------------------------------------------------------------


def compensation(
    consumer: Consumer, model: Model, found: Statistics, gone: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """New weights (outputs, columns), and what is added to the bias (outputs,): the best for the consumer's
    output in mean square. None where the columns are taken to be uncorrelated.

    Weights that are only stored, with no bias of their own that could be written, are the best without one.

    Args:
        consumer: the operator.
        model: its model.
        found: statistics of its view.
        gone: columns whose new weights are zero.
    """
    matrix = consumer.matrix(model)
    if matrix is None or found.covariance.ndim == 1:
        return None
    stay = np.setdiff1d(np.arange(matrix.shape[1]), gone)
    second = found.ridged()
    if consumer.op is None:
        second += np.outer(found.mean, found.mean)
    new = np.zeros_like(matrix)
    carried = np.linalg.solve(second[np.ix_(stay, stay)], second[np.ix_(stay, gone)])
    new[:, stay] = matrix[:, stay] + matrix[:, gone] @ carried.T
    return new, (matrix - new) @ found.mean
