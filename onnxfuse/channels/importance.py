"""Which channels of a group can go, judged by those who read them, and how those make up for it.

A consumer y = W x that loses the columns B of x, and changes its other columns as is best for y in mean
square, is off by

    tr(W_B [(H^-1)_BB]^-1 W_B^T),        H the covariance of x,

and its best other columns are W - W_B [(H^-1)_BB]^-1 (H^-1)_B: (optimal brain surgeon, Hassibi and Stork
1993, for a block of columns). A channel's cost is the sum of that over all consumers of its group, each
relative to the variance of its own output. The cheapest channel goes first; then H^-1 of what is left
follows by one block of Gaussian elimination, so that of two channels which say the same only one is cheap
to lose.

H is that of the samples, with a ridge (`moments_seen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.channels.consumers import Consumer, RowView
from onnxfuse.channels.groups import Group
from onnxfuse.channels.moments_seen import RIDGES, Statistics
from onnxfuse.ir.model import Model

_STEPS = 256  # a group loses at least one in this many channels at a time
_DELAYED = 96  # columns that go before the matrices of those that stay are updated


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
    """One consumer, as its columns go.

    Attributes:
        static: the cost of each channel, where it does not depend on what went before; else None.
        idle: whether each channel carries nothing on the samples.
    """

    def __init__(self, consumer: Consumer, model: Model, found: Statistics | None) -> None:
        self._places = consumer.places
        matrix = consumer.matrix(model)
        size = consumer.view.columns
        given = found if found is not None else Statistics(np.zeros(size), np.ones(size), RIDGES[0], 0)
        self.static: np.ndarray | None = None
        self.idle = np.zeros(len(self._places), bool)
        if found is not None:
            silent = (given.variances() == 0) & (given.mean == 0)
            self.idle = silent[self._places].all(axis=1)
        if given.covariance.ndim == 1 or matrix is None:
            # Without W a sum is taken as it is, mean included; with it a bias makes up for means.
            energy = given.variances() + (given.mean**2 if matrix is None else 0.0)
            if matrix is not None:
                energy = energy * (matrix**2).sum(axis=0)
            total = float(energy.sum())
            self.static = (
                energy[self._places].sum(axis=1) / total if total > 0 else np.zeros(len(self._places))
            )
            return
        variance = float(np.einsum("op,op->", matrix, matrix @ given.covariance))
        self._scale = 1.0 / variance if variance > 0 else 0.0
        # Costs depend on W by W^T W alone.
        if len(matrix) > size:
            matrix = np.asarray(np.linalg.qr(matrix, mode="r"))
        self._weight = np.asfortranarray(matrix)
        self._inverse = np.asfortranarray(np.linalg.inv(given.ridged()))
        self._columns = np.arange(size)  # where each column now is
        self._gone = np.zeros(size, bool)  # of those that still are there
        self._wait()
        of_channels = self._weight.T[self._places]
        self._squares = of_channels @ of_channels.swapaxes(1, 2)  # of each channel its block of W^T W
        self._blocks = self._inverse[self._places[:, :, None], self._places[:, None, :]]

    def costs(self, channels: np.ndarray) -> np.ndarray:
        """The cost of losing each of these channels next: tr([(H^-1)_BB]^-1 W_B^T W_B)."""
        if self.static is not None:
            return self.static[channels]
        blocks, squares = self._blocks[channels], self._squares[channels]
        if blocks.shape[1] == 1:
            return self._scale * squares[:, 0, 0] / blocks[:, 0, 0]
        return self._scale * np.trace(np.linalg.solve(blocks, squares), axis1=1, axis2=2)

    def lose(self, channels: np.ndarray, left: np.ndarray) -> float:
        """The cost of losing these channels, which are taken out.

        H^-1 and W are updated many channels at a time, by one product each; until then what has to be
        subtracted from them waits.

        Args:
            channels: those that go.
            left: those that are still there then.
        """
        if self.static is not None:
            return float(self.static[channels].sum())
        at = self._columns[self._places[channels]].reshape(-1)
        waiting = self._waiting
        gains = self._gains[:waiting]
        rows = self._inverse[:, at] - self._rows[:, :waiting] @ gains[:, at]
        weights = self._weight[:, at] - self._weights[:, :waiting] @ gains[:, at]
        gain = np.linalg.solve(rows[at], rows.T)  # [(H^-1)_BB]^-1 (H^-1)_B:
        inner = weights.T @ weights
        cost = self._scale * float(np.trace(np.linalg.solve(rows[at], inner)))
        cross = weights.T @ self._weight - (weights.T @ self._weights[:, :waiting]) @ gains
        self._update_blocks(left, rows, gain, cross, inner)
        self._gone[at] = True
        self._waiting += len(at)
        if self._waiting > len(self._gains):
            self._apply(rows, weights, gain)
        else:
            new = slice(waiting, self._waiting)
            self._rows[:, new], self._weights[:, new], self._gains[new] = rows, weights, gain
        return max(cost, 0.0)

    def _update_blocks(
        self, left: np.ndarray, rows: np.ndarray, gain: np.ndarray, cross: np.ndarray, inner: np.ndarray
    ) -> None:
        """The blocks of H^-1 and W^T W after W loses W_B `gain`.

        Args:
            left: the channels whose blocks are wanted.
            rows: (H^-1)_:B.
            gain: (columns that go, columns).
            cross, inner: W_B^T W and W_B^T W_B.
        """
        at = self._columns[self._places[left]]
        gains, crosses = gain.T[at], cross.T[at]  # (channels, columns of each, columns that go)
        self._blocks[left] -= rows[at] @ gains.swapaxes(1, 2)
        mixed = gains @ crosses.swapaxes(1, 2)
        self._squares[left] += gains @ inner @ gains.swapaxes(1, 2) - mixed - mixed.swapaxes(1, 2)

    def _apply(self, rows: np.ndarray, weights: np.ndarray, gain: np.ndarray) -> None:
        """Subtract what waits and this, and drop the columns that are gone: what is left gets by without
        them."""
        stay = np.flatnonzero(~self._gone)
        before = self._waiting - len(gain)
        inverse, weight = self._inverse[np.ix_(stay, stay)], self._weight[:, stay]
        for own_rows, own_weights, own_gain in (
            (self._rows[:, :before], self._weights[:, :before], self._gains[:before]),
            (rows, weights, gain),
        ):
            inverse -= own_rows[stay] @ own_gain[:, stay]
            weight -= own_weights @ own_gain[:, stay]
        self._inverse, self._weight = inverse, weight
        self._columns = (np.cumsum(~self._gone) - 1)[self._columns]  # of those that are gone, whatever
        self._gone = np.zeros(len(stay), bool)
        self._wait()

    def _wait(self) -> None:
        """Room for what is to be subtracted; nothing waits yet."""
        size = len(self._gone)
        self._waiting = 0
        self._rows = np.empty((size, _DELAYED), order="F")
        self._weights = np.empty((len(self._weight), _DELAYED), order="F")
        self._gains = np.empty((_DELAYED, size))


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
        alive[channels] = False
        left = np.flatnonzero(alive)
        total = sum(part.lose(channels, left) for part in parts)
        cost.extend(cost[-1] + total * (i + 1) / len(channels) for i in range(len(channels)))
        order.extend(channels.tolist())

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
