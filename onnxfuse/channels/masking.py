"""The reference for a cut: the network with the removed channels multiplied by zero at the group's sites.

**Where.** A removed channel is not zero everywhere: what a convolution no longer computes, a bias, a
BatchNormalization or a sigmoid behind it would make into something else than zero. Nor does it matter what it
is there. Operators that treat channels one by one never let a removed channel reach one that stays. It
matters only where an operator *combines* channels: at the inputs of those that sum up over the axis, a
convolution, a matrix product, a reduction, the recurrence inside an LSTM. These inputs are the sites (`sinks`
of a group), and there, after everything that happens channel by channel, the removed ones are multiplied by
zero.

**Why that is the cut network.** By induction over the nodes, every tensor of the cut network is the
original's with the removed indices taken out. Where a node treats the axis index by index, its output's
remaining indices depend on its inputs' remaining indices alone. Where it sums up over the axis, a zero adds
what a missing index adds: nothing. A node that does neither freezes the group, as does a graph output; so
the outputs, which have no removed indices, are equal.

**Statistics.** A mean over the channels also divides by their number, and so do the normalizations built on
means. There the removed channels are not only zero but not counted: the mean is the sum, with zeros, divided
by the number of those that stay. A maximum is that of the channels that stay: removed ones are lower than
anything there, and higher than anything for a minimum. A group says so (`Group.statistics`): it is a cut all
the same, but what stays is changed by what is gone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxfuse.channels import dims as algebra
from onnxfuse.channels.dims import Kept
from onnxfuse.channels.edits import chosen
from onnxfuse.channels.groups import Choice
from onnxfuse.channels.site import Sink, System
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor, Variable

BY = "mask"


def mask(model: Model, choice: Choice) -> Model:
    """A copy of the model in which, of these groups, all channels but these are multiplied by zero at the
    sites (module docstring); no size changes.

    Raises:
        ValueError: as `channels.edits.take`, or an index is repeated.
    """
    system, kept = chosen(choice)
    masked = model.copy()
    if system is None:
        return masked
    for group, indices in choice.items():
        if len(set(np.asarray(indices).tolist())) < len(indices):
            raise ValueError(f"an index of group '{group.name}' is repeated: a mask only removes")
    sites = _Sites(masked, system, kept)
    sinks = dict.fromkeys(sink for group in choice for sink in group.sinks)
    by_node: dict[str, list[Sink]] = {}
    for sink in sinks:
        by_node.setdefault(sink.node, []).append(sink)
    for output, own in by_node.items():
        node = masked.producer(masked.tensor(output))
        assert node is not None
        if own[0].kind in ("sum", "mean", "max", "min"):
            for sink in own:
                sites.leave_out(node, sink)
        if own[0].kind == "mean":
            sites.rescale(node, own)
        elif own[0].kind in ("norm", "rms norm"):
            sites.normalize(node, [sink for sink in system.sinks if sink.node == output])
    masked.prune()
    return masked


class _Sites:
    """Puts masks into a model; a tensor that several nodes sum up is masked once."""

    def __init__(self, model: Model, system: System, kept: Kept) -> None:
        self.model = model
        self.system = system
        self.kept = kept
        self._masked: dict[tuple[Tensor, int, str], Tensor] = {}

    def leave_out(self, node: Node, sink: Sink) -> None:
        """The node reads its input with the removed channels zero, or beyond what an extreme could find."""
        tensor = node.inputs[sink.slot]
        op = {"max": "Min", "min": "Max"}.get(sink.kind, "Mul")
        key = tensor, sink.axis, op
        if key not in self._masked:
            values = self.ones(sink)
            if op != "Mul":
                values = np.where(values, np.inf, -np.inf) * (1 if op == "Min" else -1)
            mask = self.constant(sink, values, f"{sink.tensor}_mask")
            self._masked[key] = self.add(op, [tensor, mask], f"{sink.tensor}_masked")
        node.inputs[sink.slot] = self._masked[key]

    def rescale(self, node: Node, sinks: Sequence[Sink]) -> None:
        """A mean: divided by the number of channels that stay."""
        result = node.outputs[0]
        node.outputs[0] = plain = Variable(self.model.unique_name(f"{result.name}_of_all"))
        ratio = math.prod(sink.dim.size / algebra.length(sink.dim, self.kept) for sink in sinks)
        self.add("Mul", [plain, self.constant(sinks[0], np.array(ratio), "ratio")], result)

    def normalize(self, node: Node, sinks: Sequence[Sink]) -> None:
        """A LayerNormalization, RMSNormalization or InstanceNormalization over what stays, written out."""
        x, result, first = node.inputs[0], node.outputs[0], sinks[0]
        inputs = [t for t in node.inputs[1:] if t.name]
        if node.op == "InstanceNormalization":
            column = self.model.add_weight("column", np.array([-1, *[1] * (first.rank - 2)]))
            inputs = [self.add("Reshape", [t, column], t.name) for t in inputs]
        epsilon = float(node.attribute("epsilon", 1e-5))
        self.model.remove([node])
        mask = self.constant(first, functools.reduce(np.multiply, map(self.ones, sinks)), "mask")
        share = self.constant(first, 1 / np.array(self.ones_count(sinks)), "share")
        axes = [sink.axis for sink in sinks]
        kept = self.add("Mul", [x, mask], "kept")
        if first.kind == "norm":
            mean = self.add("Mul", [self.total(kept, axes), share], "mean")
            kept = self.add("Mul", [self.add("Sub", [x, mean], "centered"), mask], "centered")
        square = self.total(self.add("Mul", [kept, kept], "square"), axes)
        variance = self.add("Mul", [square, share], "variance")
        shifted = self.add("Add", [variance, self.constant(first, np.array(epsilon), "epsilon")], "variance")
        operands = [self.add("Sqrt", [shifted], "deviation"), *inputs]
        steps = list(zip(("Div", "Mul", "Add"), operands, strict=False))
        for op, operand in steps:
            target = result if op == steps[-1][0] else "normalized"
            kept = self.add(op, [kept, operand], target)

    def total(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        if self.model.opset < 13:
            return self.add("ReduceSum", [x], "total", {"axes": list(axes), "keepdims": 1})
        listed = self.model.add_weight("axes", np.array(axes, np.int64))
        return self.add("ReduceSum", [x, listed], "total", {"keepdims": 1})

    def ones(self, sink: Sink) -> np.ndarray:
        """Ones for the positions of the axis that stay, zeros for the others; to be multiplied with the
        tensor."""
        ones = np.zeros(sink.dim.size)
        ones[algebra.indices(sink.dim, self.kept)] = 1
        return ones.reshape(-1, *[1] * (sink.rank - sink.axis - 1))

    def ones_count(self, sinks: Sequence[Sink]) -> int:
        return math.prod(algebra.length(sink.dim, self.kept) for sink in sinks)

    def constant(self, like: Sink, values: np.ndarray, name: str) -> Tensor:
        """A constant of the type of the tensor that a sink reads."""
        dtype = self.system.shapes[like.tensor].dtype
        return self.model.add_weight(name, values.astype(dtype))

    def add(
        self, op: str, inputs: Sequence[Tensor], output: Tensor | str, attrs: Mapping[str, Any] | None = None
    ) -> Tensor:
        return self.model.add_node(op, inputs, [output], attrs, by=BY).outputs[0]
