"""Residual blocks v = u + F(u) of a graph, and copies of them that compute u.

A copy stands behind the block: v' = v + F'(E(v)), where F' is F with weights of its own, and E is the
activation or normalization between the last sum and u, if there is one, also copied, so that F' reads what F
was trained to read. It is the identity because the last operator of F' is zero: the weights and bias of a
linear operator, or scale and bias of a BatchNormalization. These learn from the first step on, for their
gradient is what they read times the gradient of v', and what lies before them from the second on. The
activation behind v stays behind v': with one between F' and the sum, that is a ReLU at zero, nothing would
ever learn, and such blocks are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxfuse.analysis.normalization import NORMALIZATIONS
from onnxfuse.analysis.regions.linear_rules import CURVED, SCALING
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.channel_affine import training_mode
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import LinearOp, is_main_domain, linear_op
from onnxfuse.ops.table import OPS, Trait

_ENTRIES = CURVED | NORMALIZATIONS
# Behind a branch that is zero they give zeros, and hand gradients on.
_KEEPING_ZERO = OPS.unary().having(Trait.AFFINE, Trait.KEEPS_ZERO)


@dataclass(frozen=True, eq=False)
class Block:
    """A residual block.

    Attributes:
        add: the sum.
        u: what goes around.
        entry: the node that makes u of the last sum, if it is an activation or a normalization.
        branch: the nodes of F in topological order, and those that only prepare weights for it.
        last: the tensors to be zero in a copy, in order: weight and bias, or scale and bias.
    """

    add: Node
    u: Tensor
    entry: Node | None
    branch: tuple[Node, ...]
    last: tuple[Tensor, ...]


def find_blocks(model: Model) -> dict[Node, Block | str]:
    """Every sum of a tensor and something computed from it: the block, or why it can't be copied."""
    shapes = model.shapes()
    found: dict[Node, Block | str] = {}
    for node in model.nodes:
        if node.op == "Add" and is_main_domain(node) and not any(map(model.is_weight, node.inputs)):
            for u, end in (node.inputs, node.inputs[::-1]):
                inner = _between(model, u, end)
                if inner:
                    found[node] = _block(model, node, u, end, inner, shapes)
                    break
    return found


def before(model: Model, block: Block) -> Node | None:
    """The sum that the block takes its input from, directly or through `entry`."""
    return model.producer(block.u if block.entry is None else block.entry.inputs[0])


def is_own(model: Model, tensor: Tensor) -> bool:
    """Whether a copy gets this stored tensor as a weight of its own: lists of sizes and factors it shares."""
    if not (tensor.name and model.is_weight(tensor)):
        return False
    dtype, shape = weight_type(model, tensor)
    return dtype.kind == "f" and len(shape) > 0


def _between(model: Model, u: Tensor, end: Tensor) -> set[Node]:
    """The nodes on paths from u to `end`; none where there is no path."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [model.producer(end)]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            order.append(node)
            stack.extend(model.producer(t) for t in _reads(model, node) if t is not u)
    reached: set[Node] = set()
    waiting = [node for node in order if u in _reads(model, node)]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            users = (user for t in node.outputs for user in model.consumers(t))
            waiting.extend(user for user in users if user in seen)
    return reached


def _reads(model: Model, node: Node) -> list[Tensor]:
    return [*(t for t in node.inputs if t.name), *map(model.tensor, node.captured)]


def _block(model: Model, add: Node, u: Tensor, end: Tensor, inner: set[Node], shapes: Shapes) -> Block | str:
    if any(node.bodies for node in inner):
        return "its branch runs a subgraph"
    if shapes[u.name].shape is not None and shapes[u.name].shape != shapes[add.outputs[0].name].shape:
        return "the sum has another shape than what goes around"
    last = _last(model, end, inner, shapes)
    if isinstance(last, str):
        return last
    prepared = _prepared(model, inner)
    if any(model.producer(t) in prepared for t in last):
        return "the weights of its last operator are computed"
    if any(sum(node.inputs.count(t) for node in (*inner, *prepared)) > 1 for t in last):
        return "its branch uses its last weights more than once: as zeros they would stay zeros"
    branch = tuple(node for node in model.nodes if node in inner or node in prepared)
    entry = model.producer(u)
    if entry is not None and not (entry.key in _ENTRIES and _is_unary(model, entry)):
        entry = None
    return Block(add, u, entry, branch, last)


def _last(model: Model, end: Tensor, inner: set[Node], shapes: Shapes) -> tuple[Tensor, ...] | str:
    """The tensors that make the end of a branch zero when they are, or why there are none."""
    tensor = end
    while (node := model.producer(tensor)) in inner and node is not None:
        op = _linear_at(model, node, shapes)
        if op is not None:
            found = (op.weight_tensor, op.own_bias, op.added_bias)
            return tuple(t for t in found if t is not None)
        if node.op == "BatchNormalization" and not training_mode(node):
            return tuple(node.inputs[1:3])
        computed = [t for t in node.inputs if t.name and not model.is_weight(t)]
        if node.op == "Add" and len(computed) == 2:
            parts = [_last(model, t, inner, shapes) for t in computed]
            reason = next((part for part in parts if isinstance(part, str)), None)
            return reason or tuple(t for part in parts for t in part if not isinstance(t, str))
        scaling = node.key in SCALING and computed == node.inputs[:1]
        if not (scaling or node.key in _KEEPING_ZERO):
            if node.key in CURVED:
                return f"its branch ends in {node.label}: behind that a zero branch would never learn"
            return f"its branch ends in {node.label}, not in a linear operator"
        tensor = node.inputs[0]
    return "its branch does not end in a linear operator of its own"


def _linear_at(model: Model, node: Node, shapes: Shapes) -> LinearOp | None:
    """The linear operator whose last node, perhaps the sum with its bias, is this one."""
    candidates = [node, *(model.producer(t) for t in node.inputs)] if node.op == "Add" else [node]
    for candidate in candidates:
        op = linear_op(model, candidate, shapes, transposed=True) if candidate is not None else ""
        if isinstance(op, LinearOp) and op.nodes[-1] is node:
            return op
    return None


def _is_unary(model: Model, node: Node) -> bool:
    """Whether a node has one operand, its first input, beside stored values."""
    return all(model.is_weight(t) for t in node.inputs[1:] if t.name) and not node.bodies


def _prepared(model: Model, inner: set[Node]) -> set[Node]:
    """The nodes that compute weights of these nodes from stored ones."""
    constant: set[Tensor] = set()
    weights: set[Tensor] = set()
    for node in model.nodes:
        inputs = [t for t in node.inputs if t.name]
        if inputs and not node.bodies and all(model.is_weight(t) or t in constant for t in inputs):
            constant.update(node.outputs)
            if any(t in weights or is_own(model, t) for t in inputs):
                weights.update(node.outputs)
    needed: set[Node] = set()
    waiting = list(inner)
    while waiting:
        for tensor in waiting.pop().inputs:
            node_ = model.producer(tensor)
            if tensor in weights and node_ is not None and node_ not in needed:
                needed.add(node_)
                waiting.append(node_)
    return needed
