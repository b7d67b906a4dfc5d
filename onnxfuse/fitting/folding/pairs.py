"""The rule for two linear operators with nothing between them: joined into one where that is exact
(`onnxfuse.numerics.composition`) and takes no more multiplications and no more parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from onnxfuse.findings import Skip
from onnxfuse.fitting.folding.absorbing import Absorption, Found, absorb, read_only_by, store
from onnxfuse.fitting.folding.workspace import Decision, Edit, Workspace
from onnxfuse.ir.nodes import Node
from onnxfuse.numerics.composition import ConvShape, border_reason, compose_conv, compose_dense, compose_shape
from onnxfuse.ops.linear import LinearOp, linear_op


def join_linear(workspace: Workspace, node: Node) -> Decision:
    """Join two linear operators with nothing between them, where it is exact and not dearer."""
    second = linear_op(workspace.model, node, workspace.shapes)
    if isinstance(second, str):
        return None
    first = workspace.linear_before(node.inputs[0], node)
    if isinstance(first, str) or first.kind == "conv_transpose":
        return None
    if (first.kind == "conv") != (second.kind == "conv"):
        return None
    names = tuple(n.site_name for n in (*first.nodes, *second.nodes))
    joined = _join(workspace, first, second)
    found = joined if isinstance(joined, str) else absorb(workspace, joined, _joined_like(workspace))
    if isinstance(found, list):
        gone = [n for absorption in found for n in absorption.gone]
        constants = {t for n in gone for t in n.inputs if workspace.model.is_weight(t)}
        if all(read_only_by(workspace.model, tensor, gone) for tensor in constants):
            what = f"{first.node.op} and {node.op} joined into one {node.op}"
            ratio = _cost_ratio(workspace, first, second)
            all_names = tuple(n.site_name for a in found for n in (*a.gone, *a.op.nodes))
            return Edit(all_names, what, partial(store, workspace, found), {"cost": round(ratio, 4)})
        found = "the weights of the first one are shared with other operators"
    return Skip(names, f"not joined: {found}")


def _joined_like(workspace: Workspace) -> Callable[[LinearOp], Found]:
    """What joins another operator with the one before it."""

    def at(op: LinearOp) -> Found:
        first = workspace.linear_before(op.node.inputs[0], op.node)
        if isinstance(first, str) or (first.kind == "conv") != (op.kind == "conv"):
            return "no linear operator is before it"
        return _join(workspace, first, op)

    return at


def _join(workspace: Workspace, first: LinearOp, second: LinearOp) -> Found:
    between = second.node.inputs[0]
    if workspace.only_user(between) is not second.node:
        return f"'{between.name}' between them is a graph output or has other users"
    shapes = _conv_shapes(first, second) if second.kind == "conv" else None
    if isinstance(shapes, str):
        return shapes
    ratio = _cost_ratio(workspace, first, second)
    if ratio > 1:
        return f"one operator would take {ratio:.2g} times the multiplications of the two"
    if shapes is None:
        weight, bias = compose_dense((first.weight, first.bias), (second.weight, second.bias))
        joined = replace(second, in_features=first.in_features)
    else:
        composed, kernel, bias = compose_conv(
            shapes[0], _kernel(first), first.bias, shapes[1], _kernel(second), second.bias
        )
        weight = kernel.reshape(second.out_features, -1)
        joined = replace(
            second,
            in_features=first.in_features,
            groups=composed.groups,
            kernel=composed.kernel,
            strides=composed.strides,
            dilations=composed.dilations,
            pads=composed.pads,
        )

    def wire() -> list[Node]:
        node = second.node
        node.inputs[0] = first.node.inputs[0]
        if joined.kind == "conv":
            _set_geometry(node, joined)
        workspace.mark(node, [n.site_name for n in (*first.nodes, *second.nodes)])
        workspace.release([between])
        return [node]

    return Absorption(joined, weight, bias, first.nodes, wire)


def _kernel(op: LinearOp) -> np.ndarray:
    return op.weight.reshape(op.out_features, -1, *op.kernel)


def _conv_shapes(first: LinearOp, second: LinearOp) -> tuple[ConvShape, ConvShape] | str:
    if len(first.kernel) != len(second.kernel):
        return "they have different numbers of spatial axes"
    if first.pads is None or second.pads is None:
        return "the pads depend on the input size (auto_pad)"
    one, two = _conv_shape(first), _conv_shape(second)
    return border_reason(one, two, first.bias) or (one, two)


def _conv_shape(op: LinearOp) -> ConvShape:
    return ConvShape(op.kernel, op.strides, op.dilations, op.pads or (), op.groups)


def _cost_ratio(workspace: Workspace, first: LinearOp, second: LinearOp) -> float:
    """Multiplications of the joined operator over those of the two."""
    if second.kind != "conv":
        pair = first.columns * first.out_features + second.columns * second.out_features
        return first.in_features * second.out_features / pair
    composed = compose_shape(_conv_shape(first), _conv_shape(second))
    rows = _hidden_rows(workspace, first, second)
    pair_cost = rows * first.columns * first.out_features + second.columns * second.out_features
    columns = first.in_features // composed.groups * math.prod(composed.kernel)
    return columns * second.out_features / pair_cost


def _hidden_rows(workspace: Workspace, first: LinearOp, second: LinearOp) -> float:
    """Positions that the first convolution computes for each that the second does."""
    hidden, out = (workspace.shape(op.node.outputs[0]) for op in (first, second))
    counts = [
        math.prod(d for d in shape[2:] if isinstance(d, int))
        for shape in (hidden, out)
        if shape is not None and all(isinstance(d, int) and d > 0 for d in shape[2:])
    ]
    # Without sizes: what large inputs tend to.
    return counts[0] / counts[1] if len(counts) == 2 else float(math.prod(second.strides))


def _set_geometry(node: Node, op: LinearOp) -> None:
    """Write a convolution's geometry into its attributes; defaults that were not spelled out stay so."""
    ones, zeros = [1] * len(op.kernel), [0] * 2 * len(op.kernel)
    node.attrs.pop("auto_pad", None)
    for name, value, default in (
        ("kernel_shape", list(op.kernel), None),
        ("strides", list(op.strides), ones),
        ("dilations", list(op.dilations), ones),
        ("pads", list(op.pads or ()), zeros),
        ("group", op.groups, 1),
    ):
        if name in node.attrs or (value != default and default is not None):
            node.attrs[name] = value
