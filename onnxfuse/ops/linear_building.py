"""New affine operators from matrices: the way back from the one view of `ops.linear`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor


def add_linear(
    model: Model,
    op: str,
    x: Tensor,
    weight: np.ndarray | Tensor,
    bias: np.ndarray | Tensor | None,
    y: Tensor | str,
    name: str,
    *,
    kernel: Sequence[int] = (),
    attrs: Mapping[str, Any] | None = None,
    inner: tuple[str, str] | None = None,
    by: str,
    replaces: Sequence[str] = (),
) -> Node:
    """The node that holds the weights of a new operator y = W x + b; a MatMul gets an Add behind it for b.

    Args:
        model: edited in place.
        op: "Conv", "Gemm" or "MatMul".
        x: its input.
        weight: (out, in / groups * prod(kernel)) in the type to be stored, or a tensor stored as the operator
            wants it.
        bias: (out,), likewise; None for none.
        y: its output: a tensor that nothing computes, or a fresh name.
        name: of the node; stored arrays are called `name`.weight and `name`.bias.
        kernel: sizes of a convolution's kernel.
        attrs: of the node; `transB` says how a Gemm stores its weight.
        inner: of a MatMul with a bias, names of the product and of the Add; default: `name`_product and
            `name`_bias.
        by: name of the pass.
        replaces: names of the nodes in whose place it is.
    """
    attrs = dict(attrs or {})
    if not isinstance(weight, Tensor):
        stored = laid_out(op, weight, kernel, transposed=bool(attrs.get("transB", 0)))
        weight = model.add_weight(f"{name}.weight", stored)
    if isinstance(bias, np.ndarray):
        bias = model.add_weight(f"{name}.bias", bias)
    if op != "MatMul" or bias is None:
        inputs = [x, weight] if bias is None else [x, weight, bias]
        return model.add_node(op, inputs, [y], attrs, name, by=by, replaces=replaces)
    product, label = inner or (f"{name}_product", f"{name}_bias")
    node = model.add_node(op, [x, weight], [product], attrs, name, by=by, replaces=replaces)
    model.add_node("Add", [node.outputs[0], bias], [y], name=label, by=by, replaces=replaces)
    return node


def laid_out(op: str, weight: np.ndarray, kernel: Sequence[int], *, transposed: bool) -> np.ndarray:
    """A matrix as an operator stores it.

    Args:
        op: "Conv", "Gemm" or "MatMul".
        weight: (out, in / groups * prod(kernel)).
        kernel: sizes of a convolution's kernel.
        transposed: whether a Gemm has `transB`, and so stores (out, in).
    """
    if op == "Conv":
        weight = weight.reshape(len(weight), -1, *kernel)
    elif op == "MatMul" or not transposed:
        weight = weight.T
    return np.ascontiguousarray(weight)
