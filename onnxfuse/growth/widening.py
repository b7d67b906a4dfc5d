"""More channels in a group, and the function unchanged: R2WiderR, Net2WiderNet, NetMorph.

After Painter, "Towards a more complete theory of function preserving transforms". New channels are taken as
copies of old ones on every axis they lie on (`channels.edits.take`), so whatever treats channels one by one
treats them as it did the old. Then the weights that compute them and those that read them are set, by one of

- `r2r`, equations (8), (9): twins [U; U], read with [V, -V]. U and V are free: half of the new weights. Twins
  stand side by side, so that they cancel at once where a sum runs along the channels, not after it has grown
  and been rounded.
- `net2net`, equation (6): the copies stay, and what reads n copies of a channel reads each with 1/n of the
  weight, the original's included. Nothing is free; equal shares would leave the copies alike for ever, so
  the shares may differ by noise whose sum over the copies is zero, which changes nothing.
- `netmorph`, equation (7) with the zero in the outgoing half: U free, read with 0.

Each is exact at a product with weights, whatever the activations between. It is not where an operator sums
up without weights, for there is nothing to set; and statistics over the channels stay only if all channels
are repeated equally often. Such groups are refused (`width_obstacle`).

Several groups grow at once. A weight may lie on several axes of several groups, so the order counts: first
everything that is free is drawn, then what reads twins gets its signs, then what computes the second of two
twins becomes a copy of what computes the first. Old outputs read twins with opposite signs after the second
step, and new ones may read them as they like, as long as both twins do so alike.

Free weights have the standard deviation of the kernel that they join (`numerics.random_weights`). Biases,
normalizations and depthwise kernels are those of the channel that was copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxfuse.analysis.layers import MULTIPLYING
from onnxfuse.channels import dims as algebra
from onnxfuse.channels.dims import Axis, Kept
from onnxfuse.channels.edits import take
from onnxfuse.channels.groups import Group, Touch
from onnxfuse.channels.lengths import MOVING
from onnxfuse.channels.site import System
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.numerics.random_weights import deviation_of, uniform
from onnxfuse.ops.layouts import weight_type

WidthScheme = Literal["r2r", "net2net", "netmorph"]
New = Mapping[Axis, int]


def additions(group: Group, scheme: WidthScheme, ratio: float) -> dict[Axis, int]:
    """The number of new channels for each leaf of the group: at least one, and for r2r an even number.

    Args:
        group: the group.
        scheme: see the module docstring.
        ratio: about how many times as many channels.
    """
    step = 2 if scheme == "r2r" else 1
    wanted = {leaf: round(leaf.size * (ratio - 1)) for leaf in group.leaves}
    return {leaf: max(step, -(-count // step) * step) for leaf, count in wanted.items()}


def width_obstacle(group: Group, scheme: WidthScheme, new: New) -> str | None:
    """The reason why the group can't get so many new channels with the function unchanged; None if it can.

    Args:
        group: the group.
        scheme: see the module docstring.
        new: the number of new channels of each leaf.
    """
    if group.frozen is not None:
        return group.frozen
    if not all(leaf.size for leaf in group.leaves):
        return "it has no channels that new ones could be copies of"
    model = group.system.model
    for sink in group.sinks:
        if not set(group.leaves) & set(algebra.leaves(sink.part)):
            continue  # groups or heads, of which each is summed up for itself
        node = model.producer(model.tensor(sink.node))
        assert node is not None
        if sink.kind != "sum" and not (scheme == "net2net" and _is_even(group, new)):
            return (
                f"{node.label} takes statistics over the channels, which stay only if all are repeated "
                "equally often: net2net with a whole ratio"
            )
        if sink.kind == "sum" and not _is_weighted(group, node):
            return f"{node.label} sums up over the channels without stored weights, so more of them count"
    for touch in group.touches:
        if "consumer" in touch.roles and (reason := _fixed(group.system, touch, scheme)):
            return reason
    return None


def widen(
    model: Model,
    wanted: Mapping[Group, New],
    scheme: WidthScheme,
    *,
    noise: float,
    seed: int | Sequence[int],
    by: str,
) -> None:
    """Give each group so many more channels, behind those it has, without a change of the function.

    Args:
        model: edited in place; the groups were found in it or in one it is a copy of, and none has an
            `width_obstacle`.
        wanted: for each group the number of new channels of each of its leaves; even for r2r.
        scheme: see the module docstring.
        noise: for net2net, the standard deviation of what the shares of copies differ by, in standard
            deviations of the weights that they read with.
        seed: of the free weights.
        by: name of the pass, kept in new nodes.
    """
    random = np.random.default_rng(seed)
    kept: Kept = {
        leaf: np.concatenate([np.arange(leaf.size), _sources(random, leaf.size, new[leaf], scheme)])
        for new in wanted.values()
        for leaf in new
    }
    weights: dict[str, list[Touch]] = {}
    for group in wanted:
        for touch in group.touches:
            weights.setdefault(touch.weight, []).append(touch)
    floating = [n for n in weights if weight_type(model, model.tensor(n))[0].kind == "f"]
    spreads = {name: deviation_of(_value(model, model.tensor(name))) for name in floating}
    take(model, {group: _chosen(group, kept) for group in wanted}, by=by)
    for name in floating:
        tensor = model.tensor(name)
        value = _value(model, tensor).astype(np.float64)
        _fill(_Axes(value, weights[name], kept), scheme, spreads[name], noise, random)
        model.set_weight(tensor, value.astype(weight_type(model, tensor)[0]))


# What stands in the way -----------------------------------------------------------------------------


def _is_even(group: Group, new: New) -> bool:
    """Whether every channel comes equally often."""
    times = {divmod(new[leaf], leaf.size) for leaf in group.leaves}
    return len(times) == 1 and all(rest == 0 for _, rest in times)


def _is_weighted(group: Group, node: Node) -> bool:
    """Whether a node that sums up over the group multiplies by a stored weight that has the channels."""
    system = group.system
    read = {touch.weight for touch in group.touches if "consumer" in touch.roles}
    constant = [t for t in node.inputs if t.name and system.is_constant(t)]
    return any(root.name in read for t in constant for root in system.roots.get(t, (t,)))


def _fixed(system: System, touch: Touch, scheme: WidthScheme) -> str | None:
    """The reason why the weights that read the channels can't be set; None if they can."""
    tensor = system.model.tensor(touch.weight)
    dtype = weight_type(system.model, tensor)[0]
    if dtype.kind != "f":
        return f"'{touch.weight}', which reads the channels, is stored as {dtype}"
    if "producer" in touch.roles and scheme != "netmorph":
        return f"'{touch.weight}' both computes and reads the channels; netmorph can widen them"
    other = next((node for node in _users(system, tensor) if node.key not in MULTIPLYING), None)
    return None if other is None else f"{other.label} changes '{touch.weight}' before it reads the channels"


def _users(system: System, tensor: Tensor) -> Iterator[Node]:
    """The nodes that use a stored tensor, as it is or with its elements moved."""
    for node in system.model.consumers(tensor):
        if node.op in MOVING and all(map(system.is_constant, node.outputs)):
            for output in node.outputs:
                yield from _users(system, output)
        else:
            yield node


# Setting the weights --------------------------------------------------------------------------------


def _sources(random: np.random.Generator, size: int, count: int, scheme: WidthScheme) -> np.ndarray:
    """The channels (count,) that new ones are copies of: all once before one comes again; for r2r by twos."""
    needed = count // 2 if scheme == "r2r" else count
    rounds = [random.permutation(size) for _ in range(-(-needed // size))]
    drawn = np.concatenate(rounds)[:needed]
    return np.repeat(drawn, 2) if scheme == "r2r" else drawn


def _chosen(group: Group, kept: Kept) -> np.ndarray:
    """The choice of `take` for what is kept of each leaf."""
    offsets = np.cumsum([0, *(leaf.size for leaf in group.leaves)])
    return np.concatenate([kept[leaf] + offset for leaf, offset in zip(group.leaves, offsets, strict=False)])


def _value(model: Model, tensor: Tensor) -> np.ndarray:
    value = model.weight(tensor)
    assert value is not None
    return value


@dataclass(frozen=True)
class _Axes:
    """A weight after `take`, and where the channels of the groups that have grown lie on it."""

    value: np.ndarray
    touches: Sequence[Touch]
    kept: Kept

    def where(self, *, consumer: bool) -> Iterator[tuple[Touch, Axis, np.ndarray, np.ndarray]]:
        """Each touch that reads the channels, or each that doesn't, leaf by leaf: the weight with that axis
        in front (a view), and the places of every channel on it."""
        for touch in self.touches:
            if ("consumer" in touch.roles) is consumer:
                front = np.moveaxis(self.value, touch.axis, 0)
                for leaf in touch.leaves:
                    yield touch, leaf, front, algebra.places(touch.dim, leaf, self.kept)


def _fill(
    axes: _Axes, scheme: WidthScheme, deviation: float, noise: float, random: np.random.Generator
) -> None:
    """Set the new parts of a weight, in the three steps of the module docstring."""
    if scheme == "net2net":
        for _, leaf, front, places in axes.where(consumer=True):
            _share(front, places, axes.kept[leaf], uniform(random, front.shape, noise * deviation))
        return
    for touch, leaf, front, places in axes.where(consumer=False):
        if "producer" in touch.roles:
            free = places[leaf.size :].reshape(-1)
            front[free] = uniform(random, front[free].shape, deviation)
    for _, leaf, front, places in axes.where(consumer=True):
        if scheme == "netmorph":
            front[places[leaf.size :]] = 0.0
        else:
            first, second = _twins(places, leaf)
            front[first] = uniform(random, front[first].shape, deviation)
            front[second] = -front[first]
    for _, leaf, front, places in axes.where(consumer=False):
        if scheme == "r2r":
            first, second = _twins(places, leaf)
            front[second] = front[first]


def _twins(places: np.ndarray, leaf: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the first and of the second of all twins."""
    new = places[leaf.size :]
    return new[::2].reshape(-1), new[1::2].reshape(-1)


def _share(front: np.ndarray, places: np.ndarray, sources: np.ndarray, noise: np.ndarray) -> None:
    """Divide what reads a channel among its copies; the noise is centered over the copies of each."""
    times = np.bincount(sources)
    front[places] /= times[sources].reshape(-1, *[1] * front.ndim)
    sums = np.zeros((len(times), *places.shape[1:], *front.shape[1:]))
    np.add.at(sums, sources, noise[places])
    mean = sums / times.reshape(-1, *[1] * front.ndim)
    front[places] += noise[places] - mean[sources]
