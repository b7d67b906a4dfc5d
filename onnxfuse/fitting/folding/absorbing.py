"""Linear operators that take in what is beside them, without more parameters and without untying any.

A weight that several operators read is written only if all of them take the same new one, all at once: the
`Absorption` of each is asked for, and compared. A bias that others read is replaced by one of its own where
the shift that goes into it is the operator's own: then the sum of the two was not tied before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.fitting.folding.workspace import Workspace
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor, Variable
from onnxfuse.ops.layouts import is_shared, readers, stored_weight, weight_type
from onnxfuse.ops.linear import LinearOp, constant_operand, linear_op, to_layout
from onnxfuse.ops.linear_weights import overflow, write_weights


@dataclass(frozen=True, eq=False)
class Absorption:
    """One operator with what it takes in.

    Attributes:
        op: the operator, as it will be.
        weight: (out, in / groups * prod(kernel)), None to leave it alone.
        bias: (out,), None to leave it alone.
        gone: the nodes that it takes in.
        wire: takes them out of the graph, without a thought for weights.
        own_shift: whether what goes into the bias is a free vector of the operator's own.
    """

    op: LinearOp
    weight: np.ndarray | None
    bias: np.ndarray | None
    gone: tuple[Node, ...]
    wire: Callable[[], Iterable[Node]]
    own_shift: bool = False

    @property
    def holder(self) -> tuple[Node, Tensor] | None:
        """The node that reads the last bias of the operator, and the bias; None without one."""
        if self.op.bias_node is not None:
            return self.op.bias_node, constant_operand(self.op.model, self.op.bias_node)
        return None if self.op.own_bias is None else (self.op.node, self.op.own_bias)

    def weight_as_read(self) -> np.ndarray | None:
        """The weight in the operator's own layout."""
        if self.weight is None:
            return None
        return np.ascontiguousarray(to_layout(self.op, self.weight)).astype(self.op.dtype)

    def stored_bias(self) -> bytes:
        """The bytes of the bias, as it will be stored."""
        return b"" if self.bias is None else self.bias.astype(self.op.dtype).tobytes()


Found = Absorption | str
"""An absorption, or why there is none."""


def absorb(
    workspace: Workspace, first: Absorption, at: Callable[[LinearOp], Found]
) -> list[Absorption] | str:
    """The absorptions to make at once: `first`, and those of the operators that its weight is tied to.

    Args:
        workspace: has them.
        first: of one operator.
        at: the same kind of absorption by another operator.

    Returns:
        The reason where the weight would be untied, the parameters would become more, or a number overflows.
    """
    found = _tied(workspace, first, at)
    if isinstance(found, str):
        if first.weight is not None:
            return found
        found = [first]
    reason = next((r for a in found if (r := overflow(a.op, a.weight, a.bias))), None)
    return reason or _reason_against(workspace.model, found) or found


def store(workspace: Workspace, absorptions: Sequence[Absorption]) -> list[Node]:
    """Make the absorptions: wire, then write weights and biases; returns the nodes around."""
    model, first = workspace.model, absorptions[0].op
    around = [node for absorption in absorptions for node in absorption.wire()]
    for absorption in absorptions:
        op = absorption.op
        workspace.overriding(t for t in (op.weight_tensor, op.own_bias, op.added_bias) if t is not None)
    if absorptions[0].weight is not None:
        nodes = [absorption.op.node for absorption in absorptions]
        _write_tied(workspace, nodes, first, absorptions[0].weight)
    for group in _same_bias(model, absorptions):
        _write_bias(workspace, group)
    return around


def read_only_by(model: Model, tensor: Tensor, nodes: Iterable[Node]) -> bool:
    """Whether nothing but some nodes reads a tensor.

    Args:
        model: has it.
        tensor: the tensor.
        nodes: the nodes.
    """
    return set(model.consumers(tensor)) <= set(nodes) and not (
        model.captured(tensor) or model.is_output(tensor)
    )


# ---- deciding --------------------------------------------------------------------------------------------


def _tied(workspace: Workspace, first: Absorption, at: Callable[[LinearOp], Found]) -> list[Absorption] | str:
    model, weight = workspace.model, first.op.weight_tensor
    if not is_shared(model, first.op.weight_input, first.op.node):
        return [first]
    if model.is_output(weight) or model.captured(weight):
        return f"the weight '{weight.name}' is a graph output or read by a subgraph"
    found = [first]
    stored = first.weight_as_read()
    for user, read in readers(model, weight):
        apart = f"the weight '{weight.name}' is shared with {user.label}, which does not take the same"
        if sum(t is read for t in user.inputs) > 1:
            return apart
        if user is first.op.node and read is first.op.weight_input:
            continue
        op = linear_op(model, user, workspace.shapes, transposed=True)
        if isinstance(op, str) or op.weight_input is not read:
            return apart
        other = at(op)
        if isinstance(other, str) or not _same_layout(first.op, other.op):
            return apart
        own = other.weight_as_read()
        same = own is stored if own is None or stored is None else np.array_equal(own, stored)
        if not same:
            return apart
        found.append(other)
    return found


def _same_layout(first: LinearOp, second: LinearOp) -> bool:
    return (first.node.op, first.groups, first.node.attrs.get("transB", 0)) == (
        second.node.op,
        second.groups,
        second.node.attrs.get("transB", 0),
    )


def _reason_against(model: Model, absorptions: Sequence[Absorption]) -> str | None:
    """Why the absorptions would untie a bias, or store more numbers than they free; None if they don't."""
    gone = {node for absorption in absorptions for node in absorption.gone}
    elements = size = 0
    for tensor in {t: None for node in gone for t in node.inputs if model.is_weight(t)}:
        if read_only_by(model, tensor, gone):
            dtype, shape = weight_type(model, tensor)
            elements -= math.prod(shape)
            size -= math.prod(shape) * dtype.itemsize
    op, new = absorptions[0].op, absorptions[0].weight
    for own in (a.op.own_bias for a in absorptions if a.bias is not None and a.op.bias_node is not None):
        if own is not None and len(model.consumers(own)) > 1:
            return f"the bias '{own.name}' is shared with other operators"
    if new is not None:
        more = new.size - math.prod(weight_type(model, op.weight_tensor)[1])
        elements += more
        size += more * op.dtype.itemsize
    for group in _same_bias(model, absorptions):
        if group[0].bias is None:
            continue
        holder = group[0].holder
        more = group[0].op.out_features if holder is not None or np.any(group[0].bias) else 0
        if holder is not None and _is_private(model, group):
            more -= math.prod(_form(model, holder[1]))
        elif holder is not None and not all(a.own_shift for a in group):
            return f"the bias '{holder[1].name}' is shared with operators that do not take the same"
        elements += more
        size += more * group[0].op.dtype.itemsize
    if elements > 0 or size > 0:
        return f"{elements or size:,} {'numbers' if elements > 0 else 'bytes'} more would be stored"
    return None


def _is_private(model: Model, group: Sequence[Absorption]) -> bool:
    """Whether the bias that all of the group have is read by nothing else, and can be written in place."""
    holders = [a.holder for a in group if a.holder is not None]
    tensor = holders[0][1]
    once = all(sum(t is tensor for t in node.inputs) == 1 for node, _ in holders)
    layout = None if model.is_weight(tensor) else model.producer(tensor)
    alone = layout is None or not is_shared(model, layout.inputs[0], layout)
    return once and alone and read_only_by(model, tensor, [node for node, _ in holders])


def _form(model: Model, tensor: Tensor) -> tuple[int, ...]:
    """The shape of a bias as it is read."""
    found = stored_weight(model, tensor)
    assert found is not None
    return found.shape


def _same_bias(model: Model, absorptions: Sequence[Absorption]) -> list[list[Absorption]]:
    """The absorptions by the bias that they have and the one that they get."""
    groups: dict[object, list[Absorption]] = {}
    for absorption in absorptions:
        holder = absorption.holder
        both = absorption.op.own_bias is not None and absorption.op.bias_node is not None
        shape = None if holder is None else _form(model, holder[1])
        key = (holder and holder[1], shape, absorption.stored_bias(), absorption if both else None)
        groups.setdefault(key, []).append(absorption)
    return list(groups.values())


# ---- writing ---------------------------------------------------------------------------------------------


def _write_tied(workspace: Workspace, nodes: Sequence[Node], op: LinearOp, weight: np.ndarray) -> None:
    """Write the weight of an operator, and let all the nodes read it."""
    before = [node.inputs[1] for node in nodes[1:]]
    for node in nodes[1:]:
        node.inputs[1] = Variable("")
    workspace.release(before)  # else what lays the weight out for them would count as a reader
    write_weights(workspace.model, op, weight)
    for node in nodes[1:]:
        node.inputs[1] = op.node.inputs[1]
        node.attrs.pop("alpha", None)


def _write_bias(workspace: Workspace, group: Sequence[Absorption]) -> None:
    """Write the bias that all of the group get, once."""
    model, first = workspace.model, group[0]
    if first.bias is None:
        return
    places = [_place(*a.holder) for a in group if a.holder is not None]
    for node, index in places[1:]:
        node.inputs[index] = Variable("")
    write_weights(model, first.op, None, first.bias, by=workspace.by)
    if not places and len(group) > 1 and np.any(first.bias):
        for absorption in group[1:]:
            write_weights(model, absorption.op, None, absorption.bias, by=workspace.by)
        places = [_new_place(model, absorption.op.node) for absorption in group]
    for node, index in places[1:]:
        node.inputs[index] = places[0][0].inputs[places[0][1]]
    for absorption in group:
        absorption.op.node.attrs.pop("beta", None)


def _place(node: Node, tensor: Tensor) -> tuple[Node, int]:
    return node, next(i for i, t in enumerate(node.inputs) if t is tensor)


def _new_place(model: Model, node: Node) -> tuple[Node, int]:
    """The node, and the place among its inputs, that reads the bias which a linear operator just got."""
    if node.op != "MatMul":
        return node, 2
    add = node.outputs[0].outputs[0]
    return _place(add, constant_operand(model, add))
