"""The layers of a network that can be compared with each other, and those that could share one weight.

Weights are alike only where they serve alike: each layer has a role. Of a convolution or a dense layer that
is its operator's kind (`LinearOp.kind`); of a projection around an attention, what it makes: query, key or
value, or the output behind. Attention is recognized by what it computes, softmax(Q K^T) V, in one pass over
the nodes: every tensor carries a mark that says which linear operator its values come from, or that they are
such a product, its softmax, or what was attended to. Where unlike marks come together nothing is said, and
the role stays the operator's kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxfuse.analysis.attention_roles import ROLES, find_roles, heads_before, heads_behind
from onnxfuse.findings import Skip
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node
from onnxfuse.ops.layouts import Step, is_stored
from onnxfuse.ops.linear import WEIGHTED, LinearOp, linear_op
from onnxfuse.ops.shared_weights import SharedWeight, multiplied, shared_weights

_WEIGHTED = {("", op) for op in WEIGHTED}


@dataclass(frozen=True, eq=False)
class WeightLayer(SharedWeight):
    """A weight that nothing but linear operators uses, as a layer of the network.

    Attributes:
        role: the kind of the first operator, or one of `ROLES`, or some joined by "+".
        index: its place among the layers.
    """

    role: str
    index: int


def find_weight_layers(model: Model) -> tuple[list[WeightLayer], list[Skip]]:
    """All layers of the main graph in order, and the weights of linear operators that are none."""
    shapes = model.shapes()
    ops: dict[Node, LinearOp] = {}
    skips = []
    for node in model.nodes:
        found = linear_op(model, node, shapes, transposed=True)
        if isinstance(found, LinearOp):
            ops[node] = found
        elif multiplied(model, node) or (node.key in _WEIGHTED and any(_stored(model, node))):
            first = node.key in _WEIGHTED and _stored(model, node) == [True, False]
            skips.append(Skip((node.site_name,), f"{node.op} has its weight first" if first else found))
    roles = find_roles(model, ops, shapes)
    layers: list[WeightLayer] = []
    for weight in shared_weights(ops.values()):
        if reason := _obstacle(weight):
            skips.append(Skip(weight.names, f"its weight {weight.tensor.name} is {reason}"))
            continue
        parts = set().union(*(roles.get(op.node, set()) for op in weight.ops))
        role = "+".join(part for part in ROLES if part in parts) or weight.ops[0].kind
        layers.append(WeightLayer(weight.tensor, weight.ops, role, len(layers)))
    return layers, skips


def kin(layers: Sequence[WeightLayer]) -> list[list[WeightLayer]]:
    """The layers in classes, in order: any two of a class can share one weight, any two of several can't."""
    classes: dict[tuple[Any, ...], list[WeightLayer]] = {}
    for layer in layers:
        classes.setdefault(_traits(layer), []).append(layer)
    return list(classes.values())


def heads(model: Model, layer: WeightLayer) -> int | None:
    """The number of heads in each part of a layer that makes queries, keys or values.

    Of an output layer, the number of heads that its inputs come from; None of other layers, and where the
    graph does not tell.
    """
    parts = layer.role.split("+")
    if not set(parts) <= set(ROLES) or ("output" in parts and len(parts) > 1):
        return None
    shapes = model.shapes()
    if parts == ["output"]:
        found = {heads_before(model, op, shapes) for op in layer.ops}
    else:
        found = {count for op in layer.ops for count in heads_behind(model, op, len(parts), shapes)}
    return found.pop() if len(found) == 1 else None


def _traits(layer: WeightLayer) -> tuple[Any, ...]:
    """Traits that must agree where layers share a weight; how a kernel is moved over inputs need not."""
    op = layer.ops[0]
    return layer.role, op.node.op, *_layout(op), op.dtype.name, op.groups, op.kernel, op.stored.shape


def _layout(op: LinearOp) -> tuple[int, float, tuple[Step, ...]]:
    """What says how the matrix is stored: the attributes `transB` and `alpha`, and what comes before."""
    attrs = op.node.attrs
    return int(attrs.get("transB", 0)), float(attrs.get("alpha", 1.0)), op.stored.steps


def _stored(model: Model, node: Node) -> list[bool]:
    """For each of the first two inputs of a node whether it is a stored weight."""
    return [is_stored(model, tensor) for tensor in node.inputs[:2]]


def _obstacle(weight: SharedWeight) -> str | None:
    """Why a weight is none of a layer's, or None."""
    if reason := weight.other_use():
        return f"also {reason}"
    forms = {(op.node.op, op.groups, _layout(op)) for op in weight.ops}
    return "used as different matrices" if len(forms) > 1 else None
