"""How the operators that sum up over a group's channels see them.

An operator that multiplies by weights and sums is y = W x on rows x: a patch for a convolution, a token, a
sample, or the channels at one position. A channel lies on some columns of W: as many as the kernel has
taps, as a feature map has places where it was flattened, one for each head. What a cut of the channel costs
such an operator, and how the columns that stay can make up for it, is a matter of W and of the second
moments of x alone (`importance`).

Where there is no such matrix (two computed tensors are multiplied, or a sum is taken as it is), W is the
identity: what counts is how much of the input the channel carries. Where there are more columns than
moments can be kept of, they are taken to be uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.channels.groups import ChannelGroups, Choice, Group
from onnxfuse.channels.site import Sink
from onnxfuse.ir.marks import promises
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.ops.layouts import is_shared, weight_type
from onnxfuse.ops.linear import LinearOp, linear_op
from onnxfuse.ops.linear_weights import write_weights
from onnxfuse.ops.table import OPS, Kind

MOST_CORRELATED_COLUMNS = 4608
"""More columns than these are taken to be uncorrelated: a Gram matrix of that size takes 170 MB."""

_RECURRENT = OPS.of_kind(Kind.RECURRENT)


@dataclass(frozen=True)
class RowView:
    """The rows in which an operator sees a tensor.

    With a `kernel` they are its patches, `pads` and so on as in ONNX; else `axis` (from the front) is moved
    last, and each place along the others is a row. `correlated`: moments of pairs of columns are wanted,
    not only of each alone. `token` says that padding tokens can be left out.
    """

    tensor: str
    axis: int
    columns: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    correlated: bool = True
    token: bool = False


@dataclass(frozen=True, eq=False)
class Consumer:
    """An operator that sums up over a group's channels.

    Attributes:
        view: the rows it sees; its `columns` are those of all groups of a grouped convolution together.
        places: int64 (size of the group, columns per channel): the columns that each channel lies on.
        op: the operator, where its weights and bias can be written (`ops.linear_weights.write_weights`).
        stored: else the weight that multiplies, and its axis, where there is one.
        node: name of the operator's first output.
    """

    view: RowView
    places: np.ndarray
    node: str
    op: LinearOp | None = None
    stored: tuple[str, int] | None = None

    def matrix(self, model: Model) -> np.ndarray | None:
        """The matrix W (outputs, columns), float64; None for the identity."""
        if self.op is not None:
            return _block_diagonal(self.op.weight, self.op.groups)
        if self.stored is None:
            return None
        value = model.weight(model.tensor(self.stored[0]))
        assert value is not None
        last = np.moveaxis(value, self.stored[1], -1)
        return last.reshape(-1, last.shape[-1]).astype(np.float64)

    def writable(self, model: Model) -> bool:
        """Whether `write` can give it new weights without changing anybody else's, or what is promised of
        its own (`marks`)."""
        if self.op is not None:
            return not self.op.shared and self.op.groups == 1 and not promises(self.op.node)
        node = model.producer(model.tensor(self.node))
        return (
            self.stored is not None
            and node is not None
            and not promises(node)
            and not is_shared(model, model.tensor(self.stored[0]), node)
        )

    def write(
        self,
        cut: Model,
        weight: np.ndarray,
        shift: np.ndarray,
        found: ChannelGroups,
        choice: Choice,
        *,
        by: str,
    ) -> None:
        """Give the operator new weights in a model that was cut.

        Args:
            cut: the model that was cut.
            weight: (outputs, columns) of the model before; columns and outputs that are gone are left out.
            shift: (outputs,) of the model before, added to the bias, if there is one.
            found: the groups of the model before.
            choice: what it was cut by.
            by: name of the pass, kept in new nodes.
        """
        if self.stored is not None:
            name, axis = self.stored
            value = found.system.model.weight(found.system.model.tensor(name))
            assert value is not None
            new = np.moveaxis(weight.reshape(*np.moveaxis(value, axis, -1).shape), -1, axis)
            new = np.ascontiguousarray(new[np.ix_(*found.positions(name, choice))])
            cut.set_weight(cut.tensor(name), new.astype(value.dtype))
            return
        assert self.op is not None
        node = cut.producer(cut.tensor(self.node))
        assert node is not None
        now = linear_op(cut, node, found.system.shapes)
        assert isinstance(now, LinearOp)
        rows = found.positions(self.op.y, choice)[1 if self.op.kind == "conv" else -1]
        columns = found.positions(self.op.x, choice)[1 if self.op.kind == "conv" else -1]
        taps = math.prod(self.op.kernel)
        stay = (columns[:, None] * taps + np.arange(taps)).reshape(-1)
        write_weights(cut, now, weight[np.ix_(rows, stay)], (self.op.bias + shift)[rows], by=by)


def consumers(model: Model, group: Group, shapes: Mapping[str, TensorInfo]) -> list[Consumer]:
    """The consumers of a group, in the order of its sinks; means and normalizations, which count channels,
    are none.

    Args:
        model: the one that the group was found in.
        group: the group.
        shapes: of the model's tensors.
    """
    return [_consumer(model, group, sink, shapes) for sink in group.sinks if sink.kind == "sum"]


def rows_of(op: LinearOp, shapes: Mapping[str, TensorInfo]) -> RowView | None:
    """The rows that a linear operator multiplies; None where its pads or the rank of its input are not
    known, or there are too many columns for moments of their pairs."""
    if op.in_features * math.prod(op.kernel) > MOST_CORRELATED_COLUMNS:
        return None
    if op.kind == "conv":
        return None if op.pads is None else _patches(op, op.in_features * math.prod(op.kernel))
    rank = len(_shape(shapes, op.x))
    return RowView(op.x, rank - 1, op.in_features, token=True) if rank else None


def _block_diagonal(weight: np.ndarray, groups: int) -> np.ndarray:
    """The whole matrix (out, in * taps) of a grouped one (out, in / groups * taps), zero elsewhere."""
    if groups == 1:
        return weight
    out, columns = weight.shape
    wide = np.zeros((groups, out // groups, groups, columns))
    every = np.arange(groups)
    wide[every, :, every] = weight.reshape(groups, -1, columns)
    return wide.reshape(out, -1)


def _consumer(model: Model, group: Group, sink: Sink, shapes: Mapping[str, TensorInfo]) -> Consumer:
    node = model.producer(model.tensor(sink.node))
    assert node is not None
    places = group.places(sink.dim)
    op = linear_op(model, node, shapes) if sink.slot == 0 else ""
    if isinstance(op, LinearOp) and op.kind == "conv" and op.pads is not None:
        taps = math.prod(op.kernel)
        columns = (places[:, :, None] * taps + np.arange(taps)).reshape(len(places), -1)
        total = op.in_features * taps
        if total <= MOST_CORRELATED_COLUMNS:
            return Consumer(_patches(op, total), columns, sink.node, op)
        rows = RowView(sink.tensor, 1, op.in_features, correlated=False)
        direct = op.groups == 1 and op.weight_input is op.weight_tensor
        return Consumer(rows, places, sink.node, None, (op.weight_tensor.name, 1) if direct else None)
    if isinstance(op, LinearOp) and op.kind != "conv":
        last = len(_shape(shapes, sink.tensor)) - 1
        wide = op.in_features > MOST_CORRELATED_COLUMNS
        return Consumer(
            RowView(sink.tensor, last, op.in_features, correlated=not wide, token=True), places, sink.node, op
        )
    stored = _stored(model, node, sink)
    tensor, axis = sink.tensor, sink.axis
    if node.key in _RECURRENT and sink.slot == 2:
        # What the recurrence sums up over is its own output of the step before.
        stored = sink.tensor, sink.axis
        tensor, axis = node.outputs[0].name, len(_shape(shapes, node.outputs[0].name)) - 1
    if not tensor or (sink.tensor == tensor and model.is_weight(model.tensor(tensor))):
        return Consumer(RowView("", 0, sink.dim.size, correlated=False), places, sink.node, None, stored)
    correlated = stored is not None and sink.dim.size <= MOST_CORRELATED_COLUMNS
    return Consumer(
        RowView(tensor, axis, sink.dim.size, correlated=correlated), places, sink.node, None, stored
    )


def _shape(shapes: Mapping[str, TensorInfo], tensor: str) -> Sequence[int | str | None]:
    info = shapes.get(tensor)
    return () if info is None or info.shape is None else info.shape


def _patches(op: LinearOp, columns: int) -> RowView:
    assert op.pads is not None
    return RowView(op.x, 1, columns, op.groups, op.kernel, op.strides, op.dilations, op.pads)


def _stored(model: Model, node: Node, sink: Sink) -> tuple[str, int] | None:
    """The stored tensor that a sink's is multiplied by, and its axis of the same channels."""
    for tensor, axis in _factors(node, sink):
        if model.is_weight(tensor) and tensor.name != sink.tensor:
            sizes = weight_type(model, tensor)[1]
            if -len(sizes) <= axis < len(sizes) and sizes[axis] == sink.dim.size:
                return tensor.name, axis % len(sizes)
    return None


def _factors(node: Node, sink: Sink) -> Iterator[tuple[Tensor, int]]:
    """The other operand of a product, with the axis it is summed up over along with the sink's."""
    inputs, groups = node.inputs, int(node.attrs.get("group", 1))
    match node.op, sink.slot:
        case ("Conv", 0) if groups == 1:
            yield inputs[1], 1
        case ("ConvTranspose", 0) if groups == 1:
            yield inputs[1], 0
        case ("LSTM" | "GRU" | "RNN", 0):
            yield inputs[1], 2
        case ("MatMul", 1):
            yield inputs[0], -1
        case ("Einsum", slot):
            terms = str(node.attrs["equation"]).replace(" ", "").split("->")[0].split(",")
            letter = terms[slot][sink.axis]
            for tensor, term in zip(inputs, terms, strict=True):
                if letter in term:
                    yield tensor, term.index(letter)
