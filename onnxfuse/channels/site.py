"""One node as a rule sees it, and the record of what rules say of a model.

A rule states how the axes of a node's outputs come from those of its inputs: it returns them, made of the
same `Axis` objects. On the way it says which axes are the same (`ChannelNode.same`), over which the operator
sums up (`contract`, `sums`), which numbers stand for lengths (`number`), and what can't be taken at all
(`freeze`).
Axes that it takes from `sizes` are places that the operator slides over or makes up, nothing to take.

What is recorded here refers to tensors and nodes by name, so it holds for every copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from onnxfuse.channels.dims import Axis, ClashError, freeze_leaves, is_dynamic, leaves, mark_channel, unify
from onnxfuse.channels.grids import LARGEST_TABLE, Grid, of_table
from onnxfuse.channels.lengths import Numbers, Tag, of_constant, worth_reading
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.view import ModelNodeView

Axes = tuple[Axis, ...]
ChannelRule = Callable[["ChannelNode"], "list[Axes | None]"]
SinkKind = Literal["sum", "mean", "norm", "rms norm", "max", "min"]
Role = Literal["producer", "consumer", "along"]
SINGLE = "a single index"
UNKNOWN_SIZE = 1_000_003  # stands for a size that nothing is known of; no size of a real axis


class StopRuleError(Exception):
    """A rule's reason why nothing that the node touches can be taken."""


@dataclass(frozen=True)
class Sink:
    """A place where an operator sums up over an axis: where a removed channel must count as zero.

    Attributes:
        node: name of the first output of the node.
        slot, axis: of the input that is read; `tensor` is its name, `rank` its rank.
        dim: the axis.
        part: what of it is summed up, where that is but one of its factors: the channels of a group, the
            dimensions of a head.
        kind: "sum"; or "mean", "norm", "rms norm", where the number of channels counts too; or "max", "min",
            where a removed channel must not be the one that is found.
    """

    node: str
    slot: int
    axis: int
    tensor: str
    rank: int
    dim: Axis
    part: Axis
    kind: SinkKind = "sum"


@dataclass(frozen=True)
class Place:
    """Where a number is written: in an attribute (an entry of it if that is a list), or in an element of an
    input that lists lengths.

    Attributes:
        node: name of the first output of the node.
        attribute: its name, or None.
        slot: of the input, or None.
        entry: element of the list.
    """

    node: str
    attribute: str | None = None
    slot: int | None = None
    entry: int | None = None

    def __str__(self) -> str:
        where = self.attribute if self.attribute is not None else f"input {self.slot}"
        return where if self.entry is None else f"{where}[{self.entry}]"


@dataclass(frozen=True)
class Number:
    """A number of the graph that must stay `sign` times the length of `dim`. `tag` says what it is computed
    from, if it is no constant; `inferable` that a Reshape may be told to infer it (-1), having no other such.
    """

    place: Place
    dim: Axis
    sign: int = 1
    tag: Tag = None
    inferable: bool = False


@dataclass(frozen=True)
class EvenSplit:
    """A Split whose sizes are not written down one by one, because they are equal: its node's first output,
    the axes."""

    node: str
    dims: Axes


@dataclass(frozen=True)
class FlatView:
    """A Gather that does nothing but reshape a flat tensor: its node's first output, the axes."""

    node: str
    dims: Axes


@dataclass(frozen=True)
class Pin:
    """Something that the lengths of `dims` go into and that must not follow them: an input of a node that is
    used as a number, or an attribute whose default is computed from a length."""

    node: str
    dims: frozenset[Axis]
    slot: int | None = None
    attribute: str | None = None
    value: float = 0.0


@dataclass(frozen=True)
class AxisUse:
    """The role of an axis of a stored tensor for an operator that multiplies by it.

    Attributes:
        tensor: the stored tensor.
        axis: of it; None where the tensor was rearranged before it got there.
        dim: the axis, or the part of it that has the role.
        role: the operator's output ("producer"), its input ("consumer") or both at once, channel by channel
            ("along").
        node: the operator's name.
    """

    tensor: Tensor
    axis: int | None
    dim: Axis
    role: Role
    node: str


@dataclass
class System:
    """The axes of a model's tensors and what ties them: what all rules together have said.

    Attributes:
        model: as it was; nothing here is changed.
        shapes: sizes at one run.
        static: sizes that are the same in every run.
        axes: of each tensor that is known, its axes.
        sequences: of each tensor that is a sequence of known length, its elements' axes.
        numbers: of small integer tensors, by name, their values (see the module `lengths`).
        roots: of tensors that depend on constants alone, the stored ones they come from.
        grids: of integer tensors that grow by even steps, by name, those steps (see the module `grids`).
        sinks, written, splits, views, pins, uses: see the classes.
    """

    model: Model
    shapes: Mapping[str, TensorInfo]
    static: Mapping[str, TensorInfo]
    axes: dict[Tensor, Axes] = field(default_factory=dict)
    sequences: dict[Tensor, list[Axes]] = field(default_factory=dict)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    roots: dict[Tensor, tuple[Tensor, ...]] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    written: list[Number] = field(default_factory=list)
    splits: list[EvenSplit] = field(default_factory=list)
    views: list[FlatView] = field(default_factory=list)
    grids: dict[str, Grid | None] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)
    uses: list[AxisUse] = field(default_factory=list)

    def axes_of(self, tensor: Tensor) -> Axes | None:
        """The axes of a tensor; of a stored one or a graph input they are made here."""
        if tensor not in self.axes:
            made = self._made(tensor)
            if made is None:
                return None
            self.axes[tensor] = made
        return self.axes[tensor]

    def _made(self, tensor: Tensor) -> Axes | None:
        if self.model.is_weight(tensor):
            self.roots[tensor] = (tensor,)
            sizes = weight_type(self.model, tensor)[1]
            return tuple(Axis(size, frozen=SINGLE if size == 1 else None) for size in sizes)
        if self.model.producer(tensor) is None and tensor.name:
            return self.positions(tensor, f"graph input '{tensor.name}'", position=False)
        return None

    def numbers_of(self, tensor: Tensor) -> Numbers | None:
        """The known elements of a small tensor of numbers; None where there are none."""
        if tensor.name not in self.numbers and self.model.is_weight(tensor):
            if not worth_reading(*weight_type(self.model, tensor)):
                return None
            value = self.model.weight(tensor)
            assert value is not None
            self.numbers[tensor.name] = of_constant(value)
        return self.numbers.get(tensor.name)

    def grid_of(self, tensor: Tensor) -> Grid | None:
        """The steps of an integer tensor; None where they are not even, or it is not known."""
        if tensor.name not in self.grids and self.model.is_weight(tensor):
            dtype, shape = weight_type(self.model, tensor)
            readable = dtype.kind in "iu" and math.prod(shape) <= LARGEST_TABLE
            value = self.model.weight(tensor) if readable else None
            self.grids[tensor.name] = None if value is None else of_table(value)
        return self.grids.get(tensor.name)

    def positions(self, tensor: Tensor, frozen: str, *, position: bool = True) -> Axes | None:
        """New axes of a tensor's sizes, of which nothing can be taken; None where the rank is not known.

        Args:
            tensor: a tensor of the model.
            frozen: the reason.
            position: whether they count nothing but places.
        """
        info = self.shapes.get(tensor.name)
        if info is None or info.shape is None:
            return None
        static = self.static.get(tensor.name)
        known = static.shape if static is not None and static.shape is not None else ()
        sizes = [size if isinstance(size, int) else UNKNOWN_SIZE for size in info.shape]
        fixed = (
            [isinstance(size, int) for size in known] if len(known) == len(sizes) else [False] * len(sizes)
        )
        return tuple(
            Axis(size, frozen=frozen, dynamic=not own, position=position)
            for size, own in zip(sizes, fixed, strict=True)
        )

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether it depends on stored tensors alone."""
        return tensor in self.roots or self.model.is_weight(tensor)


class ChannelNode(ModelNodeView):
    """One node, as its rule sees it."""

    def __init__(self, system: System, node: Node) -> None:
        self.system = system
        self.node = node
        self.output = next((t.name for t in node.outputs if t.name), node.name)
        self.declared: set[tuple[int, int]] = set()  # (slot, element) of numbers that the rule cares for

    # Looking

    @property
    def opset(self) -> int:
        """The model's version of the default domain."""
        return self.system.model.opset

    def axes(self, slot: int = 0) -> Axes:
        """Axes of an input. Stops the rule if they are unknown."""
        tensor = self.node.inputs[slot]
        found = self.system.axes_of(tensor)
        if found is None:
            raise StopRuleError(f"the shape of '{tensor.name}' is unknown")
        return found

    def data(self) -> list[int]:
        """The inputs that are there."""
        return [slot for slot in range(len(self.node.inputs)) if self.has(slot)]

    def used_output(self, index: int) -> bool:
        """Whether the node has that output and something uses it."""
        if index >= len(self.node.outputs) or not self.node.outputs[index].name:
            return False
        tensor = self.node.outputs[index]
        model = self.system.model
        return bool(model.consumers(tensor)) or model.is_output(tensor)

    def is_constant(self, slot: int) -> bool:
        """Whether an input depends on stored tensors alone."""
        return self.has(slot) and self.system.is_constant(self.node.inputs[slot])

    def numbers(self, slot: int) -> Numbers | None:
        """The value of an input that lists numbers, with its tags; None if it is unknown."""
        if not self.has(slot):
            return None
        return self.system.numbers_of(self.node.inputs[slot])

    def listed(self, slot: int, what: str) -> list[int]:
        """The value of an input that lists integers. Stops the rule if it is not the same in every run; it
        may still be computed from lengths, for which `number` is there."""
        known = self.numbers(slot)
        if known is None or any(map(is_dynamic, known.depends())):
            raise StopRuleError(f"its {what} are computed")
        return [int(v) for v in known.value.reshape(-1)]

    def sizes(self, index: int = 0, *, of: Sequence[Axis] | None = None) -> Axes:
        """Sizes of an output, as axes of positions. They are fixed if inference says so, or if they come from
        the sizes `of` other axes alone and those are. Stops the rule if the rank is unknown."""
        tensor = self.node.outputs[index]
        found = self.system.positions(tensor, f"positions of {self.node.label}")
        if found is None:
            raise StopRuleError(f"the shape of '{tensor.name}' is unknown")
        if of is not None and not any(map(is_dynamic, of)):
            for dim in found:
                dim.dynamic = False
        return found

    def fresh(self, size: int, *, position: bool = False, frozen: str | None = None) -> Axis:
        """A new axis of a fixed size.

        Args:
            size: its size.
            position: whether it counts nothing but places.
            frozen: the reason why nothing can be taken of it.
        """
        return Axis(size, position=position, frozen=frozen)

    # Saying

    def freeze(self, dims: Iterable[Axis], reason: str) -> None:
        """Note that no channel of these can be taken, because of this node."""
        for dim in dims:
            freeze_leaves(dim, f"{reason} ({self.node.label})")

    def places(self, dims: Iterable[Axis], reason: str) -> None:
        """Note that these are no channels, but places that the operator treats in its own way."""
        for dim in dims:
            self.freeze((dim,), reason)
            for leaf in leaves(dim):
                leaf.position = True

    def same(self, first: Axis, second: Axis) -> None:
        """Note that both axes are one."""
        try:
            unify(first, second)
        except ClashError as clash:
            self.freeze((first, second), str(clash))

    def divided(
        self, divide: Callable[[Axis, Sequence[int]], list[Axis]], dim: Axis, sizes: Sequence[int]
    ) -> Axes:
        """The parts of an axis; frozen positions where it can't be divided.

        Args:
            divide: `dims.segment` or `dims.factor`.
            dim: the axis.
            sizes: of the parts.
        """
        try:
            return tuple(divide(dim, sizes))
        except ClashError as clash:
            self.freeze((dim,), str(clash))
            reason = f"{clash} ({self.node.label})"
            return tuple(self.fresh(size, position=True, frozen=reason) for size in sizes)

    def sums(self, slot: int, axis: int, kind: SinkKind = "sum", part: Axis | None = None) -> None:
        """Note that the operator sums up over an axis of an input.

        Args:
            slot: of the input.
            axis: of the input.
            kind: of the sum.
            part: the factor of the axis that it sums up over; None: all of it.
        """
        tensor = self.node.inputs[slot]
        dim = self.axes(slot)[axis]
        info = self.system.shapes.get(tensor.name)
        if info is None or info.dtype is None or info.dtype.kind in "iub":
            self.freeze((dim,), "a sum that is not in floating point")
        rank = len(self.axes(slot))
        self.system.sinks.append(Sink(self.output, slot, axis, tensor.name, rank, dim, part or dim, kind))

    def contract(self, slot: int, axis: int, other: int, other_axis: int) -> None:
        """Note that the operator multiplies two inputs along these axes and sums up.

        Args:
            slot: of one input.
            axis: of that input.
            other: slot of the other input.
            other_axis: of the other input.
        """
        self.same(self.axes(slot)[axis], self.axes(other)[other_axis])
        if self.is_constant(other):
            self.weight(other, other_axis, "consumer")
            self.sums(slot, axis)
        elif self.is_constant(slot):
            self.weight(slot, axis, "consumer")
            self.sums(other, other_axis)
        else:
            self.sums(slot, axis)
            self.sums(other, other_axis)

    def weight(self, slot: int, axis: int, role: Role, part: Axis | None = None) -> None:
        """Note the role of an axis of the node's weights; does nothing for an input that is no weight.

        Args:
            slot: of the input.
            axis: of the input.
            role: see `AxisUse`.
            part: the part of the axis that has the role; None: all of it.
        """
        tensor = self.node.inputs[slot]
        if not self.is_constant(slot):
            return
        dim = part or self.axes(slot)[axis]
        mark_channel(dim)
        for root in self.system.roots.get(tensor, (tensor,)):
            at = axis % len(self.axes(slot)) if root is tensor else None
            self.system.uses.append(AxisUse(root, at, dim, role, self.node.site_name))

    def number(
        self,
        dim: Axis,
        *,
        attribute: str | None = None,
        slot: int | None = None,
        entry: int | None = None,
        sign: int = 1,
        inferable: bool = False,
    ) -> None:
        """Note a number that must follow the length of an axis.

        Args:
            dim: the axis.
            attribute: that holds the number, None where an input does.
            slot: of the input that holds it.
            entry: element of the list that holds it.
            sign: the number is `sign` times the length.
            inferable: whether a Reshape may be told to infer it.
        """
        tag: Tag = None
        if slot is not None and entry is not None:
            self.declared.add((slot, entry))
            known = self.numbers(slot)
            tag = None if known is None else known.tags.reshape(-1)[entry]
        self.system.written.append(
            Number(Place(self.output, attribute, slot, entry), dim, sign, tag, inferable)
        )
