"""Stored weights, the nodes that multiply by each, and those that go with nodes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.layouts import readers, stored_weight, weight_type
from onnxfuse.ops.linear import FLOATING, LinearOp
from onnxfuse.ops.table import OPS, Kind

MULTIPLYING = OPS.of_kind(Kind.LINEAR, Kind.RECURRENT).weighted()
"""Operators that have weights to multiply by."""


class ReadWeight(ABC):
    """A stored weight and the nodes of one model that multiply by it.

    Attributes:
        tensor: the stored weight.
    """

    tensor: Tensor

    @property
    @abstractmethod
    def model(self) -> Model:
        """The model that has both."""

    @property
    @abstractmethod
    def users(self) -> tuple[Node, ...]:
        """The nodes, in the order of the graph."""

    @property
    def name(self) -> str:
        """Name of the first node."""
        return self.users[0].site_name

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes."""
        return tuple(node.site_name for node in self.users)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(weight_type(self.model, self.tensor)[1])

    def read(self, model: Model) -> np.ndarray:
        """The weight that this model, or a copy of it, has stored."""
        value = model.weight(model.tensor(self.tensor.name))
        assert value is not None
        return value

    def nodes(self, model: Model) -> list[Node]:
        """The nodes in a copy of the model."""
        outputs = (next(t.name for t in node.outputs if t.name) for node in self.users)
        return [producer(model, name) for name in outputs]

    def other_use(self) -> str | None:
        """Another use of the weight beside being that of these nodes, in words; None without one."""
        if self.model.is_output(self.tensor):
            return "an output of the graph"
        for user, read in readers(self.model, self.tensor):
            if read.name in user.captured:
                return f"used by a body of {user.label}"
            if user not in self.users or sum(used is read for used in user.inputs) > 1:
                return f"used by {user.label}"
        return None


@dataclass(frozen=True, eq=False)
class SharedWeight(ReadWeight):
    """A stored weight and the linear operators of one model that multiply by it.

    Attributes:
        tensor: the stored weight.
        ops: its operators, in the order of the graph.
    """

    tensor: Tensor
    ops: tuple[LinearOp, ...]

    @property
    def model(self) -> Model:
        """The operators' model."""
        return self.ops[0].model

    @property
    def users(self) -> tuple[Node, ...]:
        """The operators' nodes."""
        return tuple(op.node for op in self.ops)

    @property
    def matrix(self) -> np.ndarray:
        """The weight as a float64 matrix (out, in / groups * prod(kernel)); a row is an output channel."""
        return self.ops[0].weight


@dataclass(frozen=True, eq=False)
class AnyWeight(ReadWeight):
    """A stored weight and whatever nodes of one model multiply by it: linear or recurrent ones, Einsum.

    Attributes:
        tensor: the stored weight.
        holder: the model that has it.
        by: its nodes, in the order of the graph.
    """

    tensor: Tensor
    holder: Model
    by: tuple[Node, ...]

    @property
    def model(self) -> Model:
        """The model that has the weight."""
        return self.holder

    @property
    def users(self) -> tuple[Node, ...]:
        """Its nodes."""
        return self.by


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


def multiplied(model: Model, node: Node) -> list[Tensor]:
    """The stored tensors that a node multiplies its data by: matrices and kernels, the two of a recurrent
    operator, no biases.

    Args:
        model: has the node.
        node: any node; most have none.
    """
    row = MULTIPLYING.get(*node.key)
    if row is None:
        return []
    slots = row.weights[:1] if row.operands == 1 and row.kind is Kind.LINEAR else row.weights[:2]
    given = [node.inputs[slot] for slot in slots if slot < len(node.inputs)]
    found = [stored_weight(model, tensor) for tensor in given]
    floating = (own for own in found if own is not None and own.dtype.name in FLOATING and 0 not in own.shape)
    return [own.tensor for own in floating]


def producer(model: Model, tensor: str) -> Node:
    """The node that computes a tensor."""
    node = model.producer(model.tensor(tensor))
    assert node is not None
    return node
