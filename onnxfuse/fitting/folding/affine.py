"""The rule for a scale and shift per channel: into the linear operator before them or the one behind.

With y = W x + b in front, scale s and shift t per channel of y,

    s (W x + b) + t = (diag(s) W) x + (s b + t),

and behind, W (s x + t) + b = (W diag(s)) x + (W t + b): the latter for a convolution only if it does not pad
or t = 0, since what it pads with is zero, not t.

Where several operators read W, all of them must be scaled alike (`onnxfuse.fitting.folding.absorbing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from onnxfuse.fitting.folding.absorbing import Absorption, Found, absorb, store
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

MAX_CARRIERS = 6
"""Operators looked through between a BatchNormalization and the linear operator behind it."""

_SHIFTS = ("BatchNormalization", "Add", "Sub")


def fold_affine(workspace: Workspace, node: Node) -> Decision:
    """Move BatchNormalization, Mul, Add, ... into the linear operator before or behind."""
    x = affine_input(workspace.model, node)
    if x is None:
        return None
    before = _edit(workspace, node, _into_previous(workspace, node, x), _previous_like(workspace, node), "")
    if isinstance(before, Edit):
        return before
    behind = _edit(workspace, node, _into_next(workspace, node, x), _next_like(workspace, node), " behind it")
    if isinstance(behind, Edit) or node.op != "BatchNormalization":
        return behind if isinstance(behind, Edit) else None
    if training_mode(node):
        return refuse(node, "BatchNormalization is in training mode")
    return refuse(
        node, f"BatchNormalization stays. Not into what is before it: {before}. Nor behind it: {behind}"
    )


def _edit(
    workspace: Workspace, node: Node, first: Found, at: Callable[[LinearOp], Found], where: str
) -> Edit | str:
    """The edit by which an operator, and those that its weight is tied to, take in what is like `node`."""
    found = first if isinstance(first, str) else absorb(workspace, first, at)
    if isinstance(found, str):
        return found
    op = found[0].op
    names = tuple(n.site_name for absorption in found for n in (*absorption.op.nodes, *absorption.gone))
    what = f"{node.op} into the {op.node.op}{where}" if where else f"{node.op} into {op.node.op}"
    channels = op.in_features if where else op.out_features
    return Edit(names, what, lambda: store(workspace, found), {"channels": channels})


def _into_previous(workspace: Workspace, node: Node, x: Tensor) -> Found:
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
    bias = op.bias * affine.scale + affine.shift
    names = (*(n.site_name for n in op.nodes), node.site_name)

    def wire() -> list[Node]:
        target = node.outputs[0]
        last = op.nodes[-1]
        workspace.overriding(node.inputs)
        workspace.model.remove([node])
        last.outputs[0] = target
        workspace.mark(op.node, names)
        return [op.node, last]

    weight = None if _same_stored(op, scaled, op.weight) else scaled
    return Absorption(op, weight, bias, (node,), wire, own_shift=node.op in _SHIFTS)


def _previous_like(workspace: Workspace, node: Node) -> Callable[[LinearOp], Found]:
    """What finds, for another operator, an operator like `node` behind it, to be taken in."""

    def at(op: LinearOp) -> Found:
        for tensor in (op.y, op.node.outputs[0].name):
            user = workspace.only_user(workspace.model.tensor(tensor))
            x = None if user is None else affine_input(workspace.model, user)
            if user is not None and user.op == node.op and x is not None and x.name == tensor:
                return _into_previous(workspace, user, x)
        return f"no {node.op} is behind it"

    return at


def _same_stored(op: LinearOp, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two weights are the same as stored: a scale that is 1 but for rounding changes nothing."""
    with np.errstate(over="ignore"):  # `overflow` tells
        return np.array_equal(one.astype(op.dtype), other.astype(op.dtype))


def _into_next(workspace: Workspace, node: Node, x: Tensor) -> Found:
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
    scaled, bias = _rescale_inputs(op, affine)
    names = (node.site_name, *(n.site_name for n in op.nodes))

    def wire() -> list[Node]:
        workspace.overriding(node.inputs)
        workspace.read_instead(node.outputs[0], x)
        workspace.model.remove([node])
        workspace.mark(op.node, names)
        return [*path, op.node]

    weight = None if _same_stored(op, scaled, op.weight) else scaled
    return Absorption(op, weight, bias if np.any(affine.shift) else None, (node,), wire)


def _next_like(workspace: Workspace, node: Node) -> Callable[[LinearOp], Found]:
    """What finds, for another operator, an operator like `node` before it, to be taken in."""

    def at(op: LinearOp) -> Found:
        tensor = op.node.inputs[0]
        for _ in range(MAX_CARRIERS + 1):
            before = workspace.model.producer(tensor)
            x = None if before is None else affine_input(workspace.model, before)
            if before is None or (x is None and before.op not in CARRIERS):
                break
            if x is not None and before.op == node.op:
                found = _into_next(workspace, before, x)
                reached = isinstance(found, Absorption) and found.op.node is op.node
                return found if reached else f"{node.op} before it goes elsewhere"
            tensor = before.inputs[0]
        return f"no {node.op} is before it"

    return at


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
