"""The coupled channels of a model, and what a cut of each would touch, before anything is cut.

What solving the equations between axes (`tracing`) leaves as leaves are channels that must be taken together,
index by index. Leaves that lie on the same axes of the same weights, side by side, make one group: the
channels of a stage before and behind those that a padded shortcut brings from the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from onnxfuse.channels import dims as algebra
from onnxfuse.channels.dims import Axis, leaves
from onnxfuse.channels.site import SINGLE, AxisUse, Number, Role, Sink, System
from onnxfuse.channels.tracing import trace
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.nodes import Tensor
from onnxfuse.runtime.session import Runtime


@dataclass(frozen=True, eq=False)
class Touch:
    """An axis of a stored tensor that a cut of the group edits.

    Attributes:
        weight: name of the tensor.
        axis: of it.
        roles: of the axis for the operators that multiply by it: their output ("producer"), their input
            ("consumer"), channel by channel ("along"); empty where it is added and the like.
        nodes: names of these operators.
        map: int64 (size of the group, positions per index): where each channel lies on the axis.
    """

    weight: str
    axis: int
    roles: tuple[Role, ...]
    nodes: tuple[str, ...]
    dim: Axis = field(repr=False)
    leaves: tuple[Axis, ...] = field(repr=False)

    @cached_property
    def map(self) -> np.ndarray:
        """The index map: int64 (size of the group, positions per index)."""
        return _places(self.dim, self.leaves)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be taken together, index by index, wherever they lie.

    Attributes:
        name: of the operator that computes them, with a number where there are several such groups; of the
            one that reads them, with "input", where none computes them by weights.
        size: number of indices.
        structure: what the axis of the first producer is made of, this group's part in brackets: `[12] x 64`
            are heads, `12 x [64]` the dimensions of a head.
        touches: what a cut edits of stored tensors.
        numbers: the attributes and lists of lengths that hold a size and are rewritten.
        sinks: the inputs of operators that sum up over the channels: where a removed one counts as zero.
        statistics: names of the nodes that take means or extremes over the channels, so that those which stay
            see the statistics of those which stay. A duplicated channel counts twice in a mean.
        frozen: why it can't be cut, or None.
    """

    name: str
    size: int
    structure: str
    touches: tuple[Touch, ...]
    numbers: tuple[Number, ...]
    sinks: tuple[Sink, ...]
    statistics: tuple[str, ...]
    frozen: str | None
    leaves: tuple[Axis, ...] = field(repr=False)
    system: System = field(repr=False)

    def places(self, dim: Axis) -> np.ndarray:
        """The group's index map on any axis it lies on, that of a sink for instance: int64 (size, positions
        per index)."""
        return _places(dim, self.leaves)

    def spread(self, indices: Sequence[int] | np.ndarray) -> dict[Axis, np.ndarray]:
        """The indices by the leaves they belong to, in their order.

        Raises:
            ValueError: an index is out of range.
        """
        chosen = np.asarray(indices, np.int64).reshape(-1)
        if np.any((chosen < 0) | (chosen >= self.size)):
            raise ValueError(
                f"group '{self.name}' has {self.size} indices, not {chosen.min()}..{chosen.max()}"
            )
        found, offset = {}, 0
        for leaf in self.leaves:
            own = chosen[(chosen >= offset) & (chosen < offset + leaf.size)]
            found[leaf] = own - offset
            offset += leaf.size
        return found


Choice = Mapping[Group, "Sequence[int] | np.ndarray"]


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of a model, in the order of their first weights."""

    groups: tuple[Group, ...]
    system: System = field(repr=False)

    @property
    def free(self) -> list[Group]:
        """The groups that can be cut."""
        return [group for group in self.groups if group.frozen is None]

    @property
    def frozen(self) -> list[Group]:
        """The groups that can't be cut."""
        return [group for group in self.groups if group.frozen is not None]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        """The group of that name. KeyError: there is none."""
        found = next((group for group in self.groups if group.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def positions(self, tensor: str, choice: Choice) -> tuple[np.ndarray, ...]:
        """For each axis of a tensor, computed ones too, the old positions that `choice` leaves, in their new
        order. KeyError: nothing is known of the tensor."""
        axes = self.system.axes[self.system.model.tensor(tensor)]
        kept = {dim: own for group, indices in choice.items() for dim, own in group.spread(indices).items()}
        return tuple(algebra.indices(dim, kept) for dim in axes)


def find_groups(model: Model, feed: Feed | None = None, runtime: Runtime | None = None) -> ChannelGroups:
    """The coupled channel groups of a model, in time linear in the number of nodes.

    Args:
        model: is not changed.
        feed: any samples, at least two of them if the batch is dynamic; the sizes of dynamic dimensions are
            taken from a run on them. Without it, what such sizes decide (a Reshape's factors) is frozen.
        runtime: where they are run; to be given with `feed`.

    Raises:
        InputError, NotApplicableError: as `runtime.observed_shapes.run_shapes`.
    """
    system = trace(model, feed, runtime)
    return ChannelGroups(tuple(_groups(system)), system)


def _places(dim: Axis, members: Sequence[Axis]) -> np.ndarray:
    return np.concatenate([algebra.places(dim, leaf) for leaf in members])


@dataclass
class _Found:
    """Touches, sinks, numbers and uses of one leaf."""

    touches: list[tuple[Tensor, int, Axis]] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    uses: list[AxisUse] = field(default_factory=list)


def _groups(system: System) -> Iterator[Group]:
    found = _gather(system)
    counts: dict[str, int] = {}
    for members in _side_by_side(found):
        group = _group(system, members, [found[leaf] for leaf in members])
        counts[group.name] = count = counts.get(group.name, 0) + 1
        yield group if count == 1 else replace(group, name=f"{group.name}#{count}")


def _gather(system: System) -> dict[Axis, _Found]:
    """All leaves that are channels of some weight, in the order of the nodes."""
    found: dict[Axis, _Found] = {}
    for tensor, axes in system.axes.items():
        if system.model.is_weight(tensor):
            for axis, dim in enumerate(axes):
                for leaf in leaves(dim):
                    if leaf.channel and not leaf.position and leaf.frozen != SINGLE:
                        found.setdefault(leaf, _Found()).touches.append((tensor, axis, dim))
    for sink in system.sinks:
        for own in _of(found, sink.dim):
            own.sinks.append(sink)
    for number in system.written:
        for own in _of(found, number.dim):
            own.numbers.append(number)
    for use in system.uses:
        for own in _of(found, use.dim):
            own.uses.append(use)
    return found


def _of(found: Mapping[Axis, _Found], dim: Axis) -> Iterator[_Found]:
    return (found[leaf] for leaf in leaves(dim) if leaf in found)


def _side_by_side(found: Mapping[Axis, _Found]) -> Iterator[list[Axis]]:
    """Leaves that lie on the same axes of the same weights, nowhere across each other."""
    alike: dict[object, list[list[Axis]]] = {}
    for leaf, own in found.items():
        touched = frozenset((t, axis, algebra.multiplicity(dim, leaf)) for t, axis, dim in own.touches)
        read = frozenset((s.node, s.slot, s.axis) for s in own.sinks)
        candidates = alike.setdefault((touched, read, leaf.frozen), [])
        for members in candidates:
            if not any(_across(dim, members[0], leaf) for _, _, dim in own.touches):
                members.append(leaf)
                break
        else:
            candidates.append([leaf])
    order = {leaf: number for number, leaf in enumerate(found)}
    every = [members for candidates in alike.values() for members in candidates]
    yield from sorted(every, key=lambda members: order[members[0]])


def _across(dim: Axis, first: Axis, second: Axis) -> bool:
    """Whether two leaves are factors of a product on this axis."""
    return bool(np.intersect1d(algebra.places(dim, first), algebra.places(dim, second)).size)


def _group(system: System, members: list[Axis], found: list[_Found]) -> Group:
    uses: dict[Tensor, list[AxisUse]] = {}
    for use in (use for own in found for use in own.uses):
        uses.setdefault(use.tensor, []).append(use)
    touches = []
    for tensor, axis, dim in found[0].touches:
        here = [use for use in uses.get(tensor, ()) if use.axis in (axis, None)]
        roles = tuple(dict.fromkeys(use.role for use in here))
        nodes = tuple(dict.fromkeys(use.node for use in here))
        touches.append(Touch(tensor.name, axis, roles, nodes, dim, tuple(members)))
    producer = next((t for t in touches if "producer" in t.roles), None)
    first = producer or touches[0]
    name = first.nodes[0] if first.nodes else first.weight
    sinks = tuple(dict.fromkeys(sink for own in found for sink in own.sinks))
    counting = (system.model.producer(system.model.tensor(s.node)) for s in sinks if s.kind != "sum")
    return Group(
        name=name if producer else f"{name} input",
        size=sum(leaf.size for leaf in members),
        structure=algebra.structure_text(first.dim, members),
        touches=tuple(touches),
        numbers=tuple(dict.fromkeys(number for own in found for number in own.numbers)),
        sinks=sinks,
        statistics=tuple(dict.fromkeys(node.site_name for node in counting if node is not None)),
        frozen=members[0].frozen,
        leaves=tuple(members),
        system=system,
    )
