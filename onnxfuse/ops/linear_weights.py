"""Writing the weights and biases of linear operators, shared ones included."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxfuse.errors import NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor, Variable
from onnxfuse.ops.layouts import StoredWeight, is_shared, stored_weight
from onnxfuse.ops.linear import LinearOp, constant_operand, read_value, to_layout


def write_weights(
    model: Model,
    op: LinearOp,
    weight: np.ndarray | None,
    bias: np.ndarray | None = None,
    *,
    by: str = "linear",
) -> None:
    """Store a weight and a bias in the layout and under the names that they have.

    The whole bias goes to the last place that holds one (the bias Add, else the node's bias input); where
    there is none and `bias` isn't all zero, Conv and Gemm get a bias input and MatMul gets an Add behind it
    (the output keeps its name). A tensor with other users is not touched: the operator gets a private copy
    under a new name.

    Args:
        model: edited in place.
        op: the operator.
        weight: (out, in / groups * prod(kernel)), None to leave it alone.
        bias: (out,), None to leave it alone.
        by: the pass, noted on an Add that is new.

    Raises:
        ValueError: a wrong shape; nothing was changed.
        NotApplicableError: a value overflows the stored dtype; nothing was changed.
    """
    if weight is not None and weight.shape != (op.out_features, op.columns):
        raise ValueError(f"weight is {weight.shape}, not {(op.out_features, op.columns)}")
    if bias is not None and bias.shape != (op.out_features,):
        raise ValueError(f"bias is {bias.shape}, not {(op.out_features,)}")
    if reason := overflow(op, weight, bias):
        raise NotApplicableError(reason)
    stored = None if weight is None else np.ascontiguousarray(to_layout(op, weight)).astype(op.dtype)
    stored_bias = None if bias is None else bias.astype(op.dtype)
    # What is stored has Gemm's factors multiplied in.
    if stored is not None:
        op.node.attrs.pop("alpha", None)
        _replace_input(model, op.node, 1, stored)
    if stored_bias is not None:
        op.node.attrs.pop("beta", None)
        _write_bias(model, op, stored_bias, by)


def share_weights(
    model: Model, ops: Sequence[LinearOp], weight: np.ndarray, bias: np.ndarray | None = None
) -> None:
    """Let operators of one layout read one initializer: the first one's, with these values.

    Args:
        model: edited in place; what nobody reads any more is left to `Model.prune`.
        ops: of equal type, layout, dtype and shape.
        weight: (out, in / groups * prod(kernel)).
        bias: (out,), shared likewise; None leaves biases alone. See `can_share_bias`.

    Raises:
        NotApplicableError: a value overflows the stored dtype; nothing was changed.
    """
    first = ops[0]
    if reason := overflow(first, weight, bias):
        raise NotApplicableError(reason)
    alpha = float(first.node.attrs.get("alpha", 1.0))
    stored = np.ascontiguousarray(to_layout(first, weight / alpha)).astype(first.dtype)
    _hand_out(model, [op.node for op in ops], [op.weight_input for op in ops], stored)
    if bias is None:
        return
    holders = [_bias_holder(op) for op in ops]
    beta = float(first.node.attrs.get("beta", 1.0)) if first.bias_node is None else 1.0
    form = _stored(model, holders[0][1])
    stored = (bias / beta).reshape(form.shape).astype(form.dtype)
    _hand_out(model, [node for node, _ in holders], [tensor for _, tensor in holders], stored)


def can_share_bias(model: Model, ops: Sequence[LinearOp]) -> bool:
    """Whether each of the operators has one bias of the same form that it alone reads."""
    forms = set()
    for op in ops:
        if op.has_bias and (op.own_bias is None or op.bias_node is None):
            node, tensor = _bias_holder(op)
            stored = _stored(model, tensor)
            whole = math.prod(stored.shape) == op.out_features
            form = (stored.dtype, stored.shape, op.bias_node is None, float(op.node.attrs.get("beta", 1.0)))
            forms.add(form if whole and not is_shared(model, tensor, node) else None)
        else:
            forms.add(None)
    return len(forms) == 1 and None not in forms


def _bias_holder(op: LinearOp) -> tuple[Node, Tensor]:
    """The node that reads the operator's only bias, and the bias."""
    if op.bias_node is not None:
        return op.bias_node, constant_operand(op.model, op.bias_node)
    assert op.own_bias is not None
    return op.node, op.own_bias


def _hand_out(model: Model, nodes: Sequence[Node], old: Sequence[Tensor], value: np.ndarray) -> None:
    """Every node reads the first of the old tensors, with this value, in place of its own."""
    _set(model, old[0], value)
    for node, tensor in zip(nodes, old, strict=True):
        place = next(i for i, t in enumerate(node.inputs) if t is tensor)
        node.inputs[place] = old[0]


def overflow(op: LinearOp, weight: np.ndarray | None, bias: np.ndarray | None) -> str | None:
    """Why numbers can't be stored in the operator's dtype (a finite one would become infinite), or None.

    Args:
        op: the operator.
        weight, bias: the numbers, None for none.
    """
    # bfloat16 is no type of NumPy's own; it has float32's range.
    limit = float(np.finfo(op.dtype if op.dtype.kind == "f" else np.float32).max)
    for values in (weight, bias):
        if values is not None and np.any(np.isfinite(values) & (np.abs(values) > limit)):
            return f"the new weights of {op.name} overflow {op.dtype}"
    return None


def _replace_input(model: Model, node: Node, index: int, value: np.ndarray) -> None:
    """Give input `index` of `node` this value, in place where nobody else uses what is stored."""
    tensor = node.inputs[index]
    if is_shared(model, tensor, node):
        node.inputs[index] = model.add_weight(_stored(model, tensor).tensor.name, value)
    elif value.shape == _stored(model, tensor).shape:
        _set(model, tensor, value)
    else:
        stored = _stored(model, tensor).tensor
        model.set_weight(stored, value)
        node.inputs[index] = stored


def _set(model: Model, tensor: Tensor, value: np.ndarray) -> None:
    """Store what makes a weight, as it is read, this value."""
    stored = _stored(model, tensor)
    model.set_weight(stored.tensor, np.ascontiguousarray(stored.stored(value)))


def _stored(model: Model, tensor: Tensor) -> StoredWeight:
    found = stored_weight(model, tensor)
    assert found is not None
    return found


def _write_bias(model: Model, op: LinearOp, bias: np.ndarray, by: str) -> None:
    own, add = op.own_bias, op.bias_node
    if add is not None:
        tensor = constant_operand(model, add)
        shape = _bias_shape(_stored(model, tensor).shape, op)
        _replace_input(
            model, add, next(i for i, t in enumerate(add.inputs) if t is tensor), bias.reshape(shape)
        )
        if own is not None:
            _replace_input(model, op.node, 2, np.zeros_like(read_value(model, own)))
    elif own is not None:
        old = read_value(model, own)
        _replace_input(model, op.node, 2, bias.reshape(old.shape if old.size == bias.size else -1))
    elif np.any(bias):
        _add_bias(model, op, bias, by)


def _bias_shape(old: tuple[int, ...], op: LinearOp) -> tuple[int, ...]:
    if math.prod(old) == op.out_features:
        return old
    return (op.out_features,) + (1,) * len(op.kernel)


def _add_bias(model: Model, op: LinearOp, bias: np.ndarray, by: str) -> None:
    node = op.node
    tensor = model.add_weight(_bias_name(op), bias)
    if node.op != "MatMul":
        if len(node.inputs) > 2:
            node.inputs[2] = tensor
        else:
            node.inputs.append(tensor)
        return
    y = node.outputs[0]
    node.outputs[0] = Variable(model.unique_name(f"{y.name}_matmul"), dtype=y.dtype, shape=y.shape)
    model.add_node("Add", [node.outputs[0], tensor], [y], name=f"{op.name}_bias", by=by)


def _bias_name(op: LinearOp) -> str:
    """'fc.weight' -> 'fc.bias'; any other weight name gets the suffix '_bias'."""
    name = str(op.weight_tensor.name)
    return f"{name[: -len('weight')]}bias" if name.endswith("weight") else f"{name}_bias"
