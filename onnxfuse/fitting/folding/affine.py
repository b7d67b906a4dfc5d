"""The rule for a scale and shift per channel: into the linear operator before them or the one behind.

With y = W x + b in front, scale s and shift t per channel of y,

    s (W x + b) + t = (diag(s) W) x + (s b + t),

and behind, W (s x + t) + b = (W diag(s)) x + (W t + b): the latter for a convolution only if it does not pad
or t = 0, since what it pads with is zero, not t.
"""

from __future__ import annotations

import math

import numpy as np

from onnxfuse.fitting.folding.workspace import Decision, Edit, Workspace, refuse
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ops.channel_affine import (
    CARRIERS,
    ChannelAffine,
    affine_input,
    carried_channels,
    channel_affine,
    training_mode,
)
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import LinearOp, is_main_domain, linear_op, output_axis
from onnxfuse.ops.linear_weights import overflow

MAX_CARRIERS = 6
"""Operators looked through between a BatchNormalization and the linear operator behind it."""


def fold_affine(workspace: Workspace, node: Node) -> Decision:
    """Move BatchNormalization, Mul, Add, ... into the linear operator before or behind."""
    x = affine_input(workspace.model, node)
    if x is None:
        return None
    before = _into_previous(workspace, node, x)
    if isinstance(before, Edit):
        return before
    behind = _into_next(workspace, node, x)
    if isinstance(behind, Edit) or node.op != "BatchNormalization":
        return behind if isinstance(behind, Edit) else None
    if training_mode(node):
        return refuse(node, "BatchNormalization is in training mode")
    return refuse(
        node, f"BatchNormalization stays. Not into what is before it: {before}. Nor behind it: {behind}"
    )


def _into_previous(workspace: Workspace, node: Node, x: Tensor) -> Edit | str:
    op = workspace.linear_before(x, node)
    if isinstance(op, str):
        return op
    if workspace.only_user(x) is not node:
        return f"'{x.name}' is a graph output or has other users"
    axis, rank = output_axis(op, workspace.shapes)
    affine = channel_affine(workspace.model, node, op.out_features, axis, rank)
    if isinstance(affine, str):
        return affine
    if node.op in ("Add", "Sub") and op.node.op == "MatMul" and op.bias_node is None and affine.scale[0] == 1:
        return "it is the bias of a MatMul already"
    scaled = op.weight * affine.scale[:, None]
    # As stored: a scale that is 1 but for rounding must not break ties.
    with np.errstate(over="ignore"):  # `overflow` below tells
        scales = not np.array_equal(scaled.astype(op.dtype), op.weight.astype(op.dtype))
    cost = workspace.copy_cost(op) if scales else 0
    weight = scaled if scales else None
    bias = op.bias * affine.scale + affine.shift
    if reason := _too_dear(workspace, node, cost) or overflow(op, weight, bias):
        return reason
    names = (*(n.site_name for n in op.nodes), node.site_name)

    def make() -> list[Node]:
        target = node.outputs[0]
        last = op.nodes[-1]
        workspace.overriding(node.inputs)
        workspace.model.remove([node])
        last.outputs[0] = target
        workspace.mark(op.node, names)
        workspace.store(op, weight, bias, cost)
        return [op.node, last]

    return Edit(names, f"{node.op} into {op.node.op}", make, {"channels": op.out_features})


def _too_dear(workspace: Workspace, node: Node, cost: int) -> str | None:
    """The reason not to break a tie of weights, where that is needed: element-wise operators are cheap."""
    if cost and node.op != "BatchNormalization":
        return "the weights it would go into are shared with other operators"
    return workspace.beyond_budget(cost)


def _into_next(workspace: Workspace, node: Node, x: Tensor) -> Edit | str:
    path, op = _linear_behind(workspace, node)
    if isinstance(op, str):
        return op
    # LayerNorm written out ends in Mul and Add, GELU in Mul: runtimes recognize them only as a whole.
    if node.op != "BatchNormalization" and (op.kind != "conv" or path or _ends_gelu(workspace, x)):
        return "only BatchNormalization is folded into a dense layer, or behind a GELU"
    affine = _input_affine(workspace, node, x, path, op)
    if isinstance(affine, str):
        return affine
    if op.kind == "conv" and np.any(affine.shift) and (op.pads is None or any(op.pads)):
        return "the convolution behind pads with zeros, which the shift would not be added to"
    weight, bias = _rescale_inputs(op, affine)
    cost = workspace.copy_cost(op)
    if reason := _too_dear(workspace, node, cost) or overflow(op, weight, bias):
        return reason
    names = (node.site_name, *(n.site_name for n in op.nodes))

    def make() -> list[Node]:
        workspace.overriding(node.inputs)
        workspace.read_instead(node.outputs[0], x)
        workspace.model.remove([node])
        workspace.mark(op.node, names)
        workspace.store(op, weight, bias if np.any(affine.shift) else None, cost)
        return [*path, op.node]

    return Edit(names, f"{node.op} into the {op.node.op} behind it", make, {"channels": op.in_features})


def _ends_gelu(workspace: Workspace, x: Tensor) -> bool:
    """Whether `x` is h * (1 + erf(..)) or h * (1 + tanh(..)), with a constant factor still to come."""
    product = workspace.model.producer(x)
    if product is None or product.op != "Mul":
        return False
    sums = [n for t in product.inputs for n in t.inputs if n.op == "Add"]
    return any(n.op in ("Erf", "Tanh") for s in sums for t in s.inputs for n in t.inputs)


def _linear_behind(workspace: Workspace, node: Node) -> tuple[list[Node], LinearOp | str]:
    """The nodes behind that keep channels apart, then the linear operator that alone reads the last."""
    path: list[Node] = []
    tensor = node.outputs[0]
    while True:
        user = workspace.only_user(tensor)
        if user is None:
            return path, f"'{tensor.name}' is a graph output or has several users"
        if user.op not in CARRIERS or not is_main_domain(user) or len(path) == MAX_CARRIERS:
            break
        path.append(user)
        tensor = user.outputs[0]
    op = linear_op(workspace.model, user, workspace.shapes)
    if isinstance(op, LinearOp) and op.node.inputs[0] is not tensor:
        return path, "it is not the input of the linear operator"
    return path, op


def _input_affine(
    workspace: Workspace, node: Node, x: Tensor, path: list[Node], op: LinearOp
) -> ChannelAffine | str:
    """Scale and shift for each input feature of `op`."""
    rank = workspace.rank(x)
    if not path:
        axis, rank = (1, len(op.kernel) + 2) if op.kind == "conv" else (-1, rank)
        return channel_affine(workspace.model, node, op.in_features, axis, rank)
    channels = math.prod(weight_type(workspace.model, node.inputs[1])[1])
    affine = channel_affine(workspace.model, node, channels, 1, rank)
    if isinstance(affine, str):
        return affine
    origin = carried_channels(path, channels, op, workspace.shapes, increasing=bool((affine.scale > 0).all()))
    if isinstance(origin, str):
        return origin
    return ChannelAffine(affine.scale[origin], affine.shift[origin])


def _rescale_inputs(op: LinearOp, affine: ChannelAffine) -> tuple[np.ndarray, np.ndarray]:
    """W diag(s) and W t + b, with s and t for each input channel."""
    taps = math.prod(op.kernel)
    grouped = op.weight.reshape(op.groups, op.out_features // op.groups, -1, taps)
    scale, shift = (v.reshape(op.groups, 1, -1, 1) for v in (affine.scale, affine.shift))
    weight = (grouped * scale).reshape(op.out_features, op.columns)
    return weight, op.bias + (grouped * shift).sum(axis=(2, 3)).reshape(-1)
