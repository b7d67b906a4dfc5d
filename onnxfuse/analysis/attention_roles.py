"""The roles of projections in an attention (query, key, value, output), and their heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxfuse.analysis.layers import MULTIPLYING
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.linear import LinearOp, optional_input
from onnxfuse.ops.table import OPS, Kind

ROLES = ("query", "key", "value", "output")
"""Those of an attention; a projection that makes several of them has them joined by "+", in this order."""


# ---- roles -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Values that come from one linear operator, and no other."""

    node: Node


@dataclass(frozen=True)
class _Product:
    """Scores: of the places of `rows` and, along the last axis, those of `columns`."""

    rows: Node | None
    columns: Node | None


@dataclass(frozen=True)
class _Other:
    what: str


_SHARES = _Other("softmax of scores")
_ATTENDED = _Other("values summed up by their shares")
_MIXED = _Other("no single source")
_Mark = _Source | _Product | _Other

_COUNTING = OPS.of_kind(Kind.SHAPE)  # what they give says nothing of values
_ATTENTIONS = OPS.of_kind(Kind.ATTENTION)
_TURNING = OPS.of_kind(Kind.EMBEDDING)


def find_roles(model: Model, ops: dict[Node, LinearOp], shapes: Shapes) -> dict[Node, set[str]]:
    """For each linear operator around an attention the roles that it has; others are left out.

    Args:
        model: has the operators.
        ops: its linear operators, by node.
        shapes: of its tensors.
    """
    marks: dict[Tensor, _Mark] = {}
    roles: dict[Node, set[str]] = {}

    def found(role: str, *of: _Mark | Node | None) -> None:
        for mark in of:
            node = mark.node if isinstance(mark, _Source) else mark
            if isinstance(node, Node):
                roles.setdefault(node, set()).add(role)

    for node in model.nodes:
        operands = [marks.get(tensor) for tensor in node.inputs]
        result: _Mark | None
        match node.key:
            case _ if node in ops:
                if operands[0] == _ATTENDED:
                    found("output", node)
                result = _Source(node)
            case kind if kind in _ATTENTIONS:
                for role, mark in zip(ROLES, _attention_inputs(node, operands), strict=False):
                    found(role, mark)
                result = _ATTENDED
            case ("", "MatMul" | "Einsum") if len(operands) == 2 and not any(
                map(model.is_weight, node.inputs)
            ):
                if _SHARES in operands:
                    found("value", *operands)
                    result = _ATTENDED
                else:
                    result = _product(node, operands)
            case ("", "Softmax") if operands and isinstance(operands[0], _Product):
                result = _MIXED
                if _is_last_axis(node, shapes):
                    found("query", operands[0].rows)
                    found("key", operands[0].columns)
                    result = _SHARES
            case ("", "Transpose") if operands and isinstance(operands[0], _Product):
                result = _transposed(node, operands[0])
            case kind if kind in _COUNTING:
                result = None
            case kind if (kind[0] and kind not in _TURNING) or kind in MULTIPLYING or node.bodies:
                result = _MIXED
            case _:
                result = _joined(node, operands)
        for place, tensor in enumerate(node.outputs):
            if result is not None and _is_float(tensor, shapes):
                marks[tensor] = _MIXED if result == _ATTENDED and place else result
    return roles


def _attention_inputs(node: Node, operands: Sequence[_Mark | None]) -> tuple[_Mark | None, ...]:
    """Marks of queries, keys and values: one without an input of its own is packed with the one before."""
    found: list[_Mark | None] = []
    for place in range(3):
        found.append(found[-1] if place and optional_input(node, place) is None else operands[place])
    return tuple(found)


def _product(node: Node, operands: Sequence[_Mark | None]) -> _Mark:
    left, right = (mark.node if isinstance(mark, _Source) else None for mark in operands)
    if node.op == "MatMul":
        return _Product(left, right)
    inputs, arrow, output = str(_text(node.attrs["equation"])).replace(" ", "").partition("->")
    has = [output[-1:] in operand for operand in inputs.split(",")]
    if not arrow or not output or all(has):
        return _MIXED
    return _Product(left, right) if has[1] else _Product(right, left)


def _transposed(node: Node, product: _Product) -> _Mark:
    perm = list(node.attrs.get("perm", ()))
    if perm and perm[-1] == len(perm) - 1:
        return product
    return _Product(product.columns, product.rows) if perm and perm[-1] == len(perm) - 2 else _MIXED


def _is_last_axis(node: Node, shapes: Shapes) -> bool:
    axis = node.attrs.get("axis", -1)
    info = shapes.get(node.inputs[0].name)
    return axis == -1 or (info is not None and info.shape is not None and axis == len(info.shape) - 1)


def _joined(node: Node, operands: Sequence[_Mark | None]) -> _Mark | None:
    """The mark of the output of an operator without weights; inputs without a mark don't count."""
    kinds = {mark for mark in operands if mark is not None}
    if len(kinds) == 1:
        return kinds.pop()
    scores = [mark for mark in kinds if isinstance(mark, _Product)]
    if node.op == "Add" and len(scores) == 1:
        return scores[0]  # a bias on scores, whatever it comes from
    return _MIXED if kinds else None


def _is_float(tensor: Tensor, shapes: Shapes) -> bool:
    """Whether it may hold values of the network, and not a mask or indices."""
    info = shapes.get(tensor.name)
    return info is None or info.dtype is None or "float" in np.dtype(info.dtype).name


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


# ---- heads -----------------------------------------------------------------------------------------------


def heads_behind(model: Model, op: LinearOp, parts: int, shapes: Shapes) -> Iterator[int | None]:
    """The number of heads of each part that an operator makes, by every Reshape and attention behind it.

    None where one of them does not tell.

    Args:
        model: has the operator.
        op: the operator.
        parts: how many of queries, keys and values it makes.
        shapes: of the model's tensors.
    """
    stack, seen = [model.tensor(op.y)], set[Tensor]()
    while stack:
        tensor = stack.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        for user in model.consumers(tensor):
            if (count := _declared_heads(user, tensor)) is not None:
                yield count
            elif user.op == "Reshape" and user.inputs[0] is tensor:
                before = _shape(tensor, shapes) or [None]
                behind = _shape(user.outputs[0], shapes) or _asked_shape(model, user.inputs[1])
                if behind[-1] is not None and behind[-1] in (before[-1], op.out_features):
                    stack.extend(user.outputs)
                else:
                    yield _split(op.out_features, parts, before, behind)
            elif not (user.key in MULTIPLYING or user.key in _COUNTING or user.bodies):
                stack.extend(user.outputs)


def _split(
    features: int, parts: int, before: Sequence[int | None], behind: Sequence[int | None]
) -> int | None:
    """Heads of each part where a Reshape splits the last axis."""
    if len(behind) < 2 or features % parts:
        return None
    each, (count, size) = features // parts, behind[-2:]
    if count and size and count * size == each:
        return count
    if before[-1] == each and size:
        return each // size if each % size == 0 else None
    alone = before[-1] == each and len(behind) == len(before) + 1
    packed = before[-1] == features and len(behind) == len(before) + 2 and behind[-3] == parts
    return count if (alone or packed) and count and each % count == 0 else None


def heads_before(model: Model, op: LinearOp, shapes: Shapes) -> int | None:
    """The number of heads that the inputs of an operator were put together from, None where nothing tells.

    Args:
        model: has the operator.
        op: the operator.
        shapes: of the model's tensors.
    """
    tensor = model.tensor(op.x)
    while (node := model.producer(tensor)) is not None:
        if (count := _declared_heads(node, tensor)) is not None:
            return count
        if node.op == "Reshape":
            before, behind = (_shape(t, shapes) or [None] for t in (node.inputs[0], node.outputs[0]))
            if before[-1] is None or before[-1] != behind[-1]:
                return _split(op.in_features, 1, behind, before)
        elif node.key in MULTIPLYING or node.bodies or not node.inputs:
            return None
        tensor = node.inputs[0]
    return None


def _declared_heads(node: Node, tensor: Tensor) -> int | None:
    """The number of heads of `tensor` by an attribute of an attention operator that reads or makes it."""
    if (node.domain, node.op) not in _ATTENTIONS:
        return None
    serves_keys = tensor in node.inputs[1:3] and tensor is not node.inputs[0]
    names = ("kv_num_heads", "num_heads") if serves_keys else ("q_num_heads", "num_heads")
    return next((int(node.attrs[name]) for name in names if name in node.attrs), None)


def _asked_shape(model: Model, shape: Tensor) -> list[int | None]:
    """The sizes that a Reshape is given, from the end on; None where 0, -1 or a computation stands."""
    stored, producer = model.weight(shape), model.producer(shape)
    if stored is not None:
        return [int(size) if size > 0 else None for size in stored.reshape(-1)]
    if producer is not None and producer.op == "Cast":
        return _asked_shape(model, producer.inputs[0])
    if producer is not None and producer.op == "Concat":
        return [size for part in producer.inputs for size in _asked_shape(model, part)]
    return [None]


def _shape(tensor: Tensor, shapes: Shapes) -> list[int | None] | None:
    """The sizes that are known, None for the others."""
    info = shapes.get(tensor.name)
    if info is None or info.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in info.shape]
