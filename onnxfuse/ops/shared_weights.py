"""Who uses a weight: linear operators grouped by the weight that they multiply by, and weights that go with
nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.linear import LinearOp, weight_type


@dataclass(frozen=True, eq=False)
class SharedWeight:
    """A stored weight and the operators of one model that multiply by it.

    Attributes:
        tensor: the stored weight.
        ops: its operators, in the order of the graph.
    """

    tensor: Tensor
    ops: tuple[LinearOp, ...]

    @property
    def name(self) -> str:
        """Name of the first operator."""
        return self.ops[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the operators."""
        return tuple(op.name for op in self.ops)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(weight_type(self.ops[0].model, self.tensor)[1])

    @property
    def matrix(self) -> np.ndarray:
        """The weight as a float64 matrix (out, in / groups * prod(kernel)); a row is an output channel."""
        return self.ops[0].weight

    def read(self, model: Model) -> np.ndarray:
        """The weight that this model, or a copy of it, has stored: in the operators' own layout."""
        value = model.weight(model.tensor(self.tensor.name))
        assert value is not None
        return value

    def nodes(self, model: Model) -> list[Node]:
        """The operators' nodes in a copy of the model."""
        return [producer(model, op.node.outputs[0].name) for op in self.ops]

    def other_use(self) -> str | None:
        """Another use of the weight beside being that of these operators, in words; None without one."""
        model, nodes = self.ops[0].model, [op.node for op in self.ops]
        if model.is_output(self.tensor):
            return "an output of the graph"
        for user in model.consumers(self.tensor):
            if self.tensor.name in user.captured:
                return f"used by a body of {user.label}"
            if user not in nodes or sum(used is self.tensor for used in user.inputs) > 1:
                return f"used by {user.label}"
        return None


def shared_weights(
    ops: Iterable[LinearOp], kind: Callable[[LinearOp], object] = lambda op: None
) -> list[SharedWeight]:
    """Operators by their weights, in the order of each one's first operator.

    Args:
        ops: of one model, in the order of its graph.
        kind: operators of one weight that differ in this are kept apart.
    """
    found: dict[tuple[Tensor, object], list[LinearOp]] = {}
    for op in ops:
        found.setdefault((op.weight_tensor, kind(op)), []).append(op)
    return [SharedWeight(tensor, tuple(own)) for (tensor, _), own in found.items()]


def own_weights(model: Model, nodes: Iterable[Node], entry: str) -> list[Tensor]:
    """The weights that nothing uses once some nodes are gone, and with them all that only they need.

    Args:
        model: has the nodes.
        nodes: those that go.
        entry: name of a tensor that stays in use.
    """
    gone = set(nodes)
    stack = [tensor for node in gone for tensor in node.inputs]
    found: dict[Tensor, None] = {}
    while stack:
        tensor = stack.pop()
        node = model.producer(tensor)
        results = [tensor] if node is None else node.outputs
        used = any(
            result.name == entry
            or model.is_output(result)
            or any(user not in gone for user in model.consumers(result))
            for result in results
        )
        if not tensor.name or used:
            continue
        if model.is_weight(tensor):
            found[tensor] = None
        elif node is not None and node not in gone:
            gone.add(node)
            stack += [*node.inputs, *(model.tensor(name) for name in node.captured)]
    return list(found)


def producer(model: Model, tensor: str) -> Node:
    """The node that computes a tensor."""
    node = model.producer(model.tensor(tensor))
    assert node is not None
    return node
