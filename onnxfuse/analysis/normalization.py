"""Whether a network still has the normalization that it was trained with.

Exporters fold BatchNormalization into the convolution before it. That changes nothing as long as the network
only runs, but a deep one that is trained further without it does badly. Nothing in the graph says that there
was one; that a deep stack of convolutions has no normalization of any kind is the sign of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import NodeProto

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.protos import bodies, operator_key
from onnxfuse.ops.table import OPS, Key, Kind, Trait

# Those without weights (LRN, an output scaled to length 1) stand in networks that have no other, too.
NORMALIZATIONS = OPS.of_kind(Kind.NORMALIZATION).weighted()
CONVOLUTIONS = OPS.having(Trait.CONVOLVES)

DEEP = 3
"""Convolutions one behind the other from which a network without normalization is taken for a folded one."""

_REARRANGING = OPS.of_kind(Kind.MOVE).having(Trait.SAME_ELEMENTS)
_TRANSPARENT = OPS.of_kind(Kind.ACTIVATION, Kind.ELEMENTWISE) | _REARRANGING


def lacks_normalization(model: Model) -> bool:
    """Whether `DEEP` or more convolutions follow one another and nothing anywhere normalizes.

    The convolutions are those of the main graph, with stored weights; a normalization counts wherever it is:
    in the body of an operator, in a local function, or written out as a subtraction of the mean.
    """
    if any(_is_normalization(node) for node in model.nodes):
        return False
    inner = [node for outer in model.nodes for body in outer.bodies for node in body.node]
    inner += [node for function in model.source.functions for node in function.node]
    return not any(key in NORMALIZATIONS for key in _operators(inner)) and _conv_depth(model) >= DEEP


def normalized_by(model: Model, tensor: Tensor) -> str | None:
    """The operator that normalizes `tensor`, as it is or behind an activation; None where there is none.

    Looked through are element-wise operators whose other operands are constants, and rearrangements.
    """
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        for user in model.consumers(current):
            if _is_normalization(user):
                return user.op
            if user.key in _TRANSPARENT and _computed(model, user) == [current]:
                waiting += user.outputs
    return None


def _computed(model: Model, node: Node) -> list[Tensor]:
    """The inputs that are not constants; of a rearrangement the first, the others being sizes."""
    if node.key in _REARRANGING:
        return node.inputs[:1]
    return [t for t in node.inputs if t.name and not model.is_weight(t)]


def _is_normalization(node: Node) -> bool:
    return node.key in NORMALIZATIONS or _subtracts_mean(node)


def _subtracts_mean(node: Node) -> bool:
    """Whether this is x - ReduceMean(x), as every normalization begins that is written out."""
    if node.op != "Sub" or not node.inputs[1].inputs:
        return False
    mean = node.inputs[1].inputs[0]
    return mean.op == "ReduceMean" and mean.inputs[0] is node.inputs[0]


def _operators(nodes: Iterable[NodeProto]) -> Iterator[Key]:
    for node in nodes:
        yield operator_key(node.domain, node.op_type)
        for body in bodies(node):
            yield from _operators(body.node)


def _conv_depth(model: Model) -> int:
    """The most convolutions on any path through the main graph."""
    depth: dict[str, int] = {}
    for node in model.nodes:
        names = [*(tensor.name for tensor in node.inputs), *node.captured]
        deepest = max((depth.get(name, 0) for name in names), default=0)
        convolves = node.key in CONVOLUTIONS and model.is_weight(node.inputs[1])
        for tensor in node.outputs:
            depth[tensor.name] = deepest + convolves
    return max(depth.values(), default=0)
