"""How wide each channel group is to be, under a budget.

What a width costs the network's outputs is a curve of its own for each group; what it saves depends on the
widths of its neighbors, for a multiply-accumulate is a product of inputs and outputs. So the best widths
can't be found one by one. They are found greedily: of all steps to a narrower width, the one with the least
loss per unit saved is taken, until the budget holds; a step may skip widths, so that a bad step in front of
a good one does not hide it. What the last, coarse step saved too much is given back where that is worth
most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from onnxfuse.analysis.cost import is_free, proto_macs
from onnxfuse.channels.dims import Axis, leaves, length
from onnxfuse.channels.groups import ChannelGroups, Group
from onnxfuse.channels.importance import Ranking
from onnxfuse.channels.site import Number
from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.layouts import weight_type

Widths = dict[Group, int]
Lengths = Mapping[Axis, range]


@dataclass(frozen=True, eq=False)
class LossCurve:
    """A group's candidate widths, from its size downwards, and the loss at each, 0 at the first."""

    group: Group
    widths: Sequence[int]
    losses: Sequence[float]

    def at(self, widths: Collection[int]) -> LossCurve:
        """The curve with those of its widths alone that are among `widths`."""
        own = [(w, loss) for w, loss in zip(self.widths, self.losses, strict=True) if w in widths]
        return LossCurve(self.group, [w for w, _ in own], [loss for _, loss in own])


def curve(
    group: Group, candidates: Sequence[int], points: Sequence[tuple[int, float]], ranking: Ranking
) -> LossCurve:
    """The loss at all candidate widths from that at some: between them it goes like the ranking's costs.

    Args:
        group: whose widths they are.
        candidates: widths, from the group's size downwards.
        points: widths and the losses that were measured there, from the widest downwards.
        ranking: the order in which channels go, and what that costs.
    """
    removed = np.array([0, *(group.size - width for width, _ in points)])
    changes = np.array([0.0, *(change for _, change in points)])
    at = group.size - np.array(candidates)
    costs = ranking.cost[removed]
    if np.all(np.isfinite(changes)) and len(points) and costs[1] > 0:
        factors = changes[1:] / costs[1:]
        losses = ranking.cost[at] * np.interp(at, removed[1:], factors)
    else:
        losses = np.interp(at, removed, changes)
    return LossCurve(group, candidates, np.maximum.accumulate(np.nan_to_num(losses, nan=np.inf)).tolist())


def finer(coarse: LossCurve, ranking: Ranking) -> LossCurve:
    """The curve at every width between its widest and its narrowest, filled in as by `curve`."""
    widths = list(range(coarse.widths[0], coarse.widths[-1] - 1, -1))
    points = list(zip(coarse.widths[1:], coarse.losses[1:], strict=True))
    return curve(coarse.group, widths, points, ranking)


@dataclass(frozen=True, eq=False)
class CostTerm:
    """A part of a cost that depends on the widths of some groups."""

    groups: tuple[Group, ...]
    value: Callable[[Lengths], float]


class Total:
    """A cost: the sum of its terms."""

    def __init__(self, terms: Sequence[CostTerm], groups: Sequence[Group]) -> None:
        self._terms = terms
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self._by_group: dict[Group, list[int]] = {group: [] for group in groups}
        for index, term in enumerate(terms):
            for group in term.groups:
                self._by_group[group].append(index)

    def at(self, widths: Widths) -> float:
        """The cost at these widths of all groups."""
        return sum(self._term(index, widths) for index in range(len(self._terms)))

    def saved(self, widths: Widths, group: Group, width: int) -> float:
        """The saving by another width of one group.

        Args:
            widths: of all groups.
            group: the one that changes.
            width: its other width.
        """
        other = {**widths, group: width}
        return sum(self._term(i, widths) - self._term(i, other) for i in self._by_group[group])

    def neighbors(self, group: Group) -> set[Group]:
        """Groups whose savings depend on this one's width, itself included."""
        return {group, *(other for index in self._by_group[group] for other in self._terms[index].groups)}

    def _term(self, index: int, widths: Widths) -> float:
        term = self._terms[index]
        key = index, tuple(widths[group] for group in term.groups)
        if key not in self._known:
            kept = {leaf: own for group in term.groups for leaf, own in _lengths(group, widths[group])}
            self._known[key] = term.value(kept)
        return self._known[key]


def _lengths(group: Group, width: int) -> Iterator[tuple[Axis, range]]:
    """The leaves of a group with the channels that each keeps, the first ones: which ones does not matter, as
    leaves of a group lie alike wherever they lie."""
    for leaf in group.leaves:
        own = min(width, leaf.size)
        width -= own
        yield leaf, range(own)


# What counts --------------------------------------------------------------------------------------


def macs(model: Model, found: ChannelGroups, groups: Sequence[Group]) -> Total:
    """Multiply-accumulates at the sizes of the run that the groups were found on.

    Args:
        model: that the groups were found in.
        found: all of its groups.
        groups: those whose widths are to be chosen.

    Raises:
        NotApplicableError: they can't be counted.
    """
    system, static = found.system, found.system.shapes
    owner = {leaf: group for group in groups for leaf in group.leaves}
    numbers: dict[str, list[Number]] = {}
    for number in system.written:
        if number.place.attribute is not None and number.place.entry is None:
            numbers.setdefault(number.place.node, []).append(number)

    def term(node: Node) -> CostTerm:
        proto = node.proto(model.opset)
        own = {
            tensor.name: system.axes.get(tensor) for tensor in (*node.inputs, *node.outputs) if tensor.name
        }
        touched = dict.fromkeys(
            owner[leaf] for dims in own.values() for leaf in _leaves(dims) if leaf in owner
        )
        written = [number for name in proto.output for number in numbers.get(name, ())]

        def value(kept: Lengths) -> float:
            shapes = {
                name: static[name] if dims is None else TensorInfo(name, None, _sizes(dims, kept))
                for name, dims in own.items()
                if dims is not None or name in static
            }
            count = proto_macs(_written(proto, written, kept) if written else proto, shapes)
            if count is None:
                raise NotApplicableError(
                    f"the MACs of {node.label} can't be counted; give ratio, params or latency"
                )
            return count

        return CostTerm(tuple(touched), value)

    return Total([term(n) for n in model.nodes if n.bodies or not is_free(n.key)], groups)


def parameters(model: Model, found: ChannelGroups, groups: Sequence[Group]) -> Total:
    """Elements of the stored tensors.

    Args:
        model: that the groups were found in.
        found: all of its groups.
        groups: those whose widths are to be chosen.
    """
    axes = found.system.axes
    owner = {leaf: group for group in groups for leaf in group.leaves}

    def term(name: str) -> CostTerm:
        tensor = model.tensor(name)
        dims = axes.get(tensor)
        touched = dict.fromkeys(owner[leaf] for leaf in _leaves(dims) if leaf in owner)
        size = math.prod(weight_type(model, tensor)[1])
        return CostTerm(
            tuple(touched),
            lambda kept: size if dims is None else math.prod(_sizes(dims, kept)),
        )

    used = {t.name for node in model.nodes for t in node.inputs if model.is_weight(t)}
    counted = (name for name in used if weight_type(model, model.tensor(name))[0].kind == "f")
    return Total([term(name) for name in sorted(counted)], groups)


def latency_total(times: Mapping[Group, Mapping[int, float]], base: float) -> Total:
    """Latency: that of the whole network less what each group saves by itself.

    Args:
        times: of each group its neighborhood's milliseconds by width (`channels.timing`).
        base: milliseconds of the whole network.
    """

    def term(group: Group) -> CostTerm:
        own = times[group]
        return CostTerm(
            (group,), lambda kept: own[sum(len(kept[leaf]) for leaf in group.leaves)] - own[group.size]
        )

    return Total([CostTerm((), lambda kept: base), *map(term, times)], list(times))


def _sizes(dims: Sequence[Axis], kept: Lengths) -> tuple[int, ...]:
    return tuple(length(dim, kept) for dim in dims)


def _written(proto: NodeProto, numbers: Sequence[Number], kept: Lengths) -> NodeProto:
    """The node with the numbers that `take` would write into its attributes."""
    copy = NodeProto()
    copy.CopyFrom(proto)
    for number in numbers:
        for attribute in copy.attribute:
            if attribute.name == number.place.attribute:
                attribute.i = number.sign * length(number.dim, kept)
    return copy


def _leaves(dims: Sequence[Axis] | None) -> Iterator[Axis]:
    return (leaf for dim in dims or () for leaf in leaves(dim))


# Choosing -----------------------------------------------------------------------------------------


def choose_widths(curves: Sequence[LossCurve], total: Total, target: float) -> Widths | None:
    """Widths at as little loss as the greedy search finds; None where the narrowest of all are not enough.

    Args:
        curves: of the groups whose widths are to be chosen.
        total: the cost of given widths.
        target: what it may be at most.
    """
    widths = {curve.group: curve.widths[0] for curve in curves}
    by_group = {curve.group: curve for curve in curves}
    at = dict.fromkeys(by_group, 0)
    now = total.at(widths)
    moves: dict[Group, tuple[float, int, float]] = {}
    stale = set(by_group)
    while now > target:
        for group in stale & set(by_group):
            moves.pop(group, None)
            best = _best_move(by_group[group], at[group], total, widths)
            if best is not None:
                moves[group] = best
        if not moves:
            return None
        group = min(moves, key=lambda g: (moves[g][0], g.name))
        _, at[group], saved = moves[group]
        widths[group] = by_group[group].widths[at[group]]
        now -= saved
        stale = total.neighbors(group)
    return _given_back(by_group, at, widths, total, target)


def _best_move(curve: LossCurve, at: int, total: Total, widths: Widths) -> tuple[float, int, float] | None:
    """The best step to a narrower width, if any saves: loss per unit saved, place of the width, saving."""
    found = []
    for place in range(at + 1, len(curve.widths)):
        saved = total.saved(widths, curve.group, curve.widths[place])
        if saved > 0:
            found.append(((curve.losses[place] - curve.losses[at]) / saved, place, saved))
    return min(found, default=None)


def filled(curves: Sequence[LossCurve], widths: Widths, total: Total, target: float) -> Widths:
    """Wider widths that spend what is left of a budget where it is worth most.

    Args:
        curves: of the groups, with finer steps than those that `widths` was chosen from.
        widths: within the budget.
        total: the cost of given widths.
        target: what it may be at most.
    """
    at = {curve.group: curve.widths.index(widths[curve.group]) for curve in curves}
    return _given_back({curve.group: curve for curve in curves}, at, dict(widths), total, target)


def _given_back(
    curves: Mapping[Group, LossCurve], at: dict[Group, int], widths: Widths, total: Total, target: float
) -> Widths:
    room = target - total.at(widths)
    while True:
        found = []
        for group, curve in curves.items():
            for place in range(at[group]):
                taken = -total.saved(widths, group, curve.widths[place])
                gain = curve.losses[at[group]] - curve.losses[place]
                if taken <= room and (gain > 0 or taken <= 0):
                    found.append((gain, -taken, group.name, group, place))
        if not found:
            return widths
        _, taken, _, group, place = max(found, key=lambda item: item[:3])
        room += taken
        at[group] = place
        widths[group] = curves[group].widths[place]
