"""Layers psi(W x + b) of a graph.

A layer is a linear operator with stored weights, the BatchNormalization behind it and the activation psi
behind that, if there are any. Operators of one kind that share their weights are one layer at several places.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.channel_affine import training_mode
from onnxfuse.ops.linear import LinearOp, is_main_domain, linear_op
from onnxfuse.ops.shared_weights import SharedWeight, shared_weights
from onnxfuse.ops.table import OPS, Kind, Trait

MULTIPLYING = OPS.of_kind(Kind.LINEAR, Kind.RECURRENT)
"""Operators that sum up over products with weights."""

IDEMPOTENT = OPS.of_kind(Kind.ACTIVATION).having(Trait.IDEMPOTENT)
"""Activations that change nothing where they have been applied already."""

# One with weights, a slope for each channel, would need others for a layer of another width.
_ACTIVATIONS = OPS.of_kind(Kind.ACTIVATION) - OPS.weighted()


@dataclass(frozen=True, eq=False)
class Layer(SharedWeight):
    """The operators of one kind that share a weight, with what follows each.

    Attributes:
        ends: for each operator, the tensor behind the activation, or behind the operator if there is none.
        activations: for each operator, the activation.
    """

    ends: tuple[Tensor, ...]
    activations: tuple[Node | None, ...]


def find_layers(model: Model) -> list[Layer]:
    """All layers of the main graph, in order."""
    shapes = model.shapes()
    ops = (linear_op(model, node, shapes, transposed=True) for node in model.nodes)
    weights = shared_weights(
        (op for op in ops if isinstance(op, LinearOp)),
        kind=lambda op: (op.node.op, op.out_features, op.groups, op.has_bias),
    )
    found = []
    for weight in weights:
        ends = [_end(model, model.tensor(op.y)) for op in weight.ops]
        behind, activations = tuple(end for end, _ in ends), tuple(psi for _, psi in ends)
        found.append(Layer(weight.tensor, weight.ops, behind, activations))
    return found


def _end(model: Model, tensor: Tensor) -> tuple[Tensor, Node | None]:
    """The tensor behind the layer that computes this one, and its activation."""
    while not (model.is_output(tensor) or model.captured(tensor)):
        users = model.consumers(tensor)
        node = users[0] if len(users) == 1 else None
        if node is None or not is_main_domain(node) or node.inputs[0] is not tensor:
            break
        if node.key in _ACTIVATIONS and all(model.is_weight(t) for t in node.inputs[1:] if t.name):
            return node.outputs[0], node
        if node.op != "BatchNormalization" or training_mode(node):
            break
        tensor = node.outputs[0]
    return tensor, None


def followed(model: Model) -> set[Tensor]:
    """The tensors behind which an operator with weights still comes."""
    found: set[Tensor] = set()
    for node in reversed(model.nodes):
        if node.key in MULTIPLYING or not found.isdisjoint(node.outputs):
            found.update(node.inputs, map(model.tensor, node.captured))
    return found
