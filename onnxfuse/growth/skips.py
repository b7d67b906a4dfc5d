"""Widening what one operator computes, and not the residual stage that it is added to.

After Painter, equation (17): behind R2WiderR a tensor is [x, x_L, x_R] with x_L = x_R, so a residual sum that
takes it can take x + (x_L - x_R) instead, which is x, and the other side of the sum keeps its width. The
difference comes first: it is zero to the last bit, where (x + x_L) - x_R would be rounded twice. Of a tensor
with fewer pairs of twins than channels the first channels get the differences, of one with more pairs the
first pairs are used.

Which channels then still belong together is asked of a probe: a copy of the model in which such a sum takes
its other side twice, so that nothing ties the two sides. The groups of the probe are widened in the model by
`widening`, and then the sums get what they had before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.analysis.constant_folding import label
from onnxfuse.channels import dims as algebra
from onnxfuse.channels.dims import Axis
from onnxfuse.channels.groups import ChannelGroups, Group, find_groups
from onnxfuse.growth.widening import New, additions, widen, width_obstacle
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.table import OPS, Trait
from onnxfuse.ops.view import TO_THE_END
from onnxfuse.runtime.session import Runtime

_SUMS = OPS.having(Trait.ADDS)
_STEPPING = 10  # the opset from which on Slice has steps


@dataclass(frozen=True)
class _Skip:
    """Inputs of a residual sum that come from the operator, and one that doesn't."""

    sum: Node
    slots: tuple[int, ...]
    other: Tensor


@dataclass(frozen=True)
class Plan:
    """The steps that widen one operator's output alone.

    Attributes:
        wanted: the groups of the probe that can grow, with the new channels of each leaf.
        refused: why the others can't.
        skips: the residual sums that take its channels.
        near: all groups of the probe.
    """

    wanted: dict[Group, New]
    refused: dict[Group, str]
    skips: tuple[_Skip, ...]
    near: ChannelGroups


def producers(groups: ChannelGroups | Group) -> list[str]:
    """The names of all operators that compute channels by weights."""
    own = (groups,) if isinstance(groups, Group) else groups
    return list(dict.fromkeys(n for g in own for t in g.touches if "producer" in t.roles for n in t.nodes))


def plan(model: Model, feed: Feed, runtime: Runtime, name: str, ratio: float) -> Plan:
    """The plan to give the output of one operator more channels alone, with the twins of r2r.

    Args:
        model: stays as it is.
        feed: see `find_groups`.
        runtime: see `find_groups`.
        name: of the operator.
        ratio: about how many times as many channels.
    """
    groups = find_groups(model, feed, runtime)
    skips = tuple(_skips(groups, name))
    probe = model.copy()
    for skip in skips:
        twin = probe.producer(probe.tensor(skip.sum.outputs[0].name))
        assert twin is not None
        for slot in skip.slots:
            twin.inputs[slot] = probe.tensor(skip.other.name)
    near = find_groups(probe, feed, runtime)
    found = Plan({}, {}, skips, near)
    for group in near:
        if name in producers(group):
            new = additions(group, "r2r", ratio)
            reason = width_obstacle(group, "r2r", new) or _unfoldable(groups, found, group)
            if reason is None:
                found.wanted[group] = new
            else:
                found.refused[group] = reason
    return found


def carry_out(model: Model, plan: Plan, *, seed: int | Sequence[int], by: str) -> None:
    """Widen a model as planned for it.

    Args:
        model: edited in place.
        plan: for this model.
        seed: see `widening.widen`.
        by: name of the pass.
    """
    widen(model, plan.wanted, "r2r", noise=0, seed=seed, by=by)
    new = {leaf: count for own in plan.wanted.values() for leaf, count in own.items()}
    folded: dict[Tensor, Tensor] = {}
    for skip in plan.skips:
        for slot in skip.slots:
            tensor = skip.sum.inputs[slot]
            for axis, dim in enumerate(_axes(plan.near, tensor)):
                pieces = [(part.size, new.get(part, 0) // 2) for part in _pieces(dim)]
                if tensor not in folded and any(pairs for _, pairs in pieces):
                    folded[tensor] = _fold(model, tensor, axis, pieces, by)
            skip.sum.inputs[slot] = folded.get(tensor, tensor)


# Finding --------------------------------------------------------------------------------------------


def _skips(groups: ChannelGroups, name: str) -> Iterator[_Skip]:
    """The residual sums at which channels that the operator computes, however they got there without being
    multiplied by weights, meet channels from elsewhere. Operators that share its weights compute them."""
    own = [group for group in groups if name in producers(group)]
    touches = [t for group in own for t in group.touches if "producer" in t.roles and name in t.nodes]
    sources = {node for touch in touches for node in touch.nodes}
    leaves = {leaf for group in own for leaf in group.leaves}
    read = {(s.node, s.slot) for group in own for s in group.sinks if leaves & set(algebra.leaves(s.part))}
    carried: set[Tensor] = set()
    for node in groups.system.model.nodes:
        first = next((t.name for t in node.outputs if t.name), "")
        inputs = [(slot, t) for slot, t in enumerate(node.inputs) if t.name and (first, slot) not in read]
        slots = tuple(slot for slot, t in inputs if t in carried)
        others = [
            t
            for _, t in inputs
            if t not in carried and not groups.system.is_constant(t) and _lies(groups, t, leaves)
        ]
        if slots and others and node.key in _SUMS:
            yield _Skip(node, slots, others[0])
        elif slots or label(node) in sources:
            carried.update(t for t in node.outputs if _lies(groups, t, leaves))


def _unfoldable(groups: ChannelGroups, plan: Plan, group: Group) -> str | None:
    """The reason why residual sums can't take the group's channels folded, if there is one."""
    shapes, leaves = groups.system.shapes, set(group.leaves)
    folded = False
    for skip in plan.skips:
        for tensor in {skip.sum.inputs[slot] for slot in skip.slots}:
            dims = [dim for dim in _axes(plan.near, tensor) if leaves & set(algebra.leaves(dim))]
            if not dims:
                continue
            folded = True
            if len(dims) > 1 or any(leaves & set(algebra.leaves(p)) - {p} for p in _pieces(dims[0])):
                return f"{skip.sum.label} takes the channels on an axis merged with others"
            if shapes[tensor.name].shape != shapes[skip.other.name].shape:
                return f"{skip.sum.label} stretches one of its inputs"
        if _lies(plan.near, skip.other, leaves):
            return f"what else {skip.sum.label} adds has these channels for other reasons, too"
    if folded and groups.system.model.opset < _STEPPING:
        return f"folding a skip takes opset {_STEPPING} or newer"
    if folded and not any("consumer" in touch.roles for touch in group.touches):
        return "only residual sums read the channels, so that new ones would change nothing"
    return None


def _axes(groups: ChannelGroups, tensor: Tensor) -> Sequence[Axis]:
    """The axes, in the groups' system, of the tensor of that name."""
    return groups.system.axes.get(groups.system.model.tensor(tensor.name), ())


def _pieces(dim: Axis) -> list[Axis]:
    """The parts that lie one after the other on an axis."""
    return algebra.parts(dim) if algebra.kind(dim) is algebra.AxisKind.SUM else [algebra.find(dim)]


def _lies(groups: ChannelGroups, tensor: Tensor, leaves: set[Axis]) -> bool:
    return any(leaves & set(algebra.leaves(dim)) for dim in _axes(groups, tensor))


# Folding --------------------------------------------------------------------------------------------


def _fold(model: Model, tensor: Tensor, axis: int, pieces: Sequence[tuple[int, int]], by: str) -> Tensor:
    """x + (x_L - x_R) of a tensor. On that axis it has, piece by piece, so many old channels and behind them
    so many pairs of twins."""

    def made(op: str, inputs: Sequence[Tensor], what: str, **attrs: int) -> Tensor:
        name = model.unique_name(f"{tensor.name}.{what}")
        return model.add_node(op, inputs, [name], attrs, name, by=by).outputs[0]

    def part(source: Tensor, start: int, end: int, what: str, step: int = 1) -> Tensor:
        bounds = {"start": start, "end": end, "axis": axis, "step": step}
        lists = [model.add_weight(f"{tensor.name}.{what}.{k}", np.array([v])) for k, v in bounds.items()]
        return made("Slice", [source, *lists], what)

    found: list[Tensor] = []
    start = 0
    for size, pairs in pieces:
        used, end = min(size, pairs), start + size
        if used:
            twins = part(tensor, end, end + 2 * used, "twins")
            left, right = part(twins, 0, TO_THE_END, "left", 2), part(twins, 1, TO_THE_END, "right", 2)
            difference = made("Sub", [left, right], "difference")
            found.append(made("Add", [part(tensor, start, start + used, "x"), difference], "folded"))
        if used < size:
            found.append(part(tensor, start + used, end, "rest"))
        start = end + 2 * pairs
    return found[0] if len(found) == 1 else made("Concat", found, "skip", axis=axis)
