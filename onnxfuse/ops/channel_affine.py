"""Operators that scale and shift each channel: y[c] = scale[c] * x[c] + shift[c].

    BatchNormalization (inference)    scale = gamma / sqrt(var + eps)    shift = beta - mean * scale
    Mul, Div by a constant            scale = k, 1 / k                   shift = 0
    Add, Sub of a constant            scale = 1, or -1 for k - x         shift = k, -k
    Neg                               scale = -1                         shift = 0

where the constant has one value per channel, or one for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import LinearOp, channel_vector, is_main_domain
from onnxfuse.ops.table import OPS, Kind, Trait

_POOLS = OPS.of_kind(Kind.POOL)
# Averages and maxima; a norm of a scaled and shifted window is nothing simple.
POOLS = (_POOLS.having(Trait.AFFINE) | _POOLS.having(Trait.SELECTS)).names
# What an affine map per channel may be moved behind: operators that mix no channels. Of those that only move
# elements, these are the ones that `_moved` can play through.
CARRIERS = POOLS | {"Transpose", "Reshape", "Flatten"}


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """One scale and one shift for each channel, float64 (channels,)."""

    scale: np.ndarray
    shift: np.ndarray


def affine_input(model: Model, node: Node) -> Tensor | None:
    """The tensor that `node` may scale and shift; None where its operator never does that to one tensor."""
    if not is_main_domain(node) or node.op not in _RULES:
        return None
    if _RULES[node.op] is not _elementwise:
        return node.inputs[0]
    computed = [t for t in node.inputs if not model.is_weight(t)]
    return computed[0] if len(node.inputs) == 2 and len(computed) == 1 else None


def channel_affine(
    model: Model, node: Node, channels: int, axis: int, rank: int | None
) -> ChannelAffine | str:
    """The scale and shift of each channel of a node's input (see `affine_input`), or why it has none.

    Args:
        model: has the node.
        node: the operator.
        channels: size of the input's channel axis.
        axis: the channel axis; -1 is the last.
        rank: of the input, None if unknown.
    """
    if affine_input(model, node) is None:
        return f"{node.op} does not scale or shift one tensor by constants"
    affine = _RULES[node.op](model, node, channels, axis, rank)
    if isinstance(affine, ChannelAffine) and not (
        np.isfinite(affine.scale).all() and np.isfinite(affine.shift).all()
    ):
        return f"{node.op} has a scale or shift that is not finite"
    return affine


def training_mode(node: Node) -> bool:
    """Whether a BatchNormalization computes batch statistics (before opset 14 said by its extra outputs)."""
    return bool(node.attrs.get("training_mode", 0)) or any(t.name for t in node.outputs[1:])


def carried_channels(
    path: Sequence[Node], channels: int, op: LinearOp, shapes: Shapes, *, increasing: bool
) -> np.ndarray | str:
    """For each input feature of `op` its channel of (N, C, *S), or why there is no such map.

    An average commutes with every affine map per channel unless it averages padding in; a maximum commutes
    with an increasing one. The rearrangements are played through on one sample that holds channel numbers.

    Args:
        path: the operators before `op`: first pools, then rearrangements.
        channels: C.
        op: the operator that reads the features.
        shapes: of the model's tensors.
        increasing: whether the map per channel is increasing, so that a maximum commutes with it.

    Returns:
        int64 (op.in_features,), or the reason.
    """
    pools = [n for n in path if n.op in POOLS]
    moves = path[len(pools) :]
    if pools != list(path[: len(pools)]):
        return "a pool follows a rearrangement of the axes"
    for pool in pools:
        if "Max" in pool.op and not increasing:
            return f"{pool.op} between does not commute with a scale that is not positive"
        if int(pool.attrs.get("count_include_pad", 0)) or any(t.name for t in pool.outputs[1:]):
            return f"{pool.op} between counts its padding, or gives indices"
    if op.kind == "conv":
        return f"{moves[0].op} between moves the channels" if moves else np.arange(channels)
    before = path[len(pools) - 1].outputs[0] if pools else path[0].inputs[0]
    info = shapes.get(before.name)
    if info is None or info.shape is None:
        return f"the rank of '{before.name}' is unknown"
    return _played_through(moves, channels, info.shape, op, shapes)


def _played_through(
    moves: Sequence[Node], channels: int, shape: Sequence[int | str | None], op: LinearOp, shapes: Shapes
) -> np.ndarray | str:
    sizes = [d for d in shape[2:] if isinstance(d, int)]
    static = len(sizes) == len(shape) - 2
    if not static:
        # One axis stands for all positions: as many of them as a flattened sample must have.
        positions = op.in_features // channels if any(n.op == "Flatten" for n in moves) else 1
        sizes = [positions] + [1] * (len(shape) - 3)
    spread = np.arange(channels).reshape(1, channels, *[1] * len(sizes))
    sample = np.broadcast_to(spread, (1, channels, *sizes))
    for node in moves:
        moved = _moved(node, sample, shapes, static)
        if isinstance(moved, str):
            return moved
        sample = moved
    rows = sample.reshape(-1, sample.shape[-1])
    if rows.shape[1] != op.in_features or np.any(rows != rows[0]):
        return "a feature comes from different channels at different positions"
    return rows[0]


def _moved(node: Node, sample: np.ndarray, shapes: Shapes, static: bool) -> np.ndarray | str:
    """One sample (1, ...) behind a rearrangement that keeps samples apart."""
    if node.op == "Flatten" and int(node.attrs.get("axis", 1)) == 1:
        return sample.reshape(1, -1)
    perm = list(node.attrs.get("perm", ()))
    if node.op == "Transpose" and perm and perm[0] == 0:
        last = [0, *range(2, sample.ndim), 1]
        return sample.transpose(perm) if static or perm == last else "the sizes of the axes are unknown"
    info = shapes.get(node.outputs[0].name)
    sizes = [] if info is None or info.shape is None else [d for d in info.shape[1:] if isinstance(d, int)]
    rank = 0 if info is None or info.shape is None else len(info.shape)
    if node.op == "Reshape" and static and len(sizes) == rank - 1 and math.prod(sizes) == sample.size:
        return sample.reshape(1, *sizes)
    return f"{node.op} between is not known to keep samples apart"


def _batch_norm(model: Model, node: Node, channels: int, axis: int, rank: int | None) -> ChannelAffine | str:
    if training_mode(node):
        return "BatchNormalization is in training mode"
    if axis != 1 and (rank is None or axis % rank != 1):
        return "BatchNormalization does not normalize the axis that the operator computes"
    values = []
    for tensor in node.inputs[1:5]:
        value = model.weight(tensor)
        if value is None:
            return f"'{tensor.name}' of BatchNormalization is computed, not constant"
        if value.shape != (channels,):
            return f"'{tensor.name}' of BatchNormalization has shape {list(value.shape)}, not [{channels}]"
        values.append(value.astype(np.float64))
    gamma, beta, mean, variance = values
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + float(node.attribute("epsilon", 1e-5)))
        return ChannelAffine(scale, beta - mean * scale)


def _elementwise(model: Model, node: Node, channels: int, axis: int, rank: int | None) -> ChannelAffine | str:
    first = model.is_weight(node.inputs[0])
    constant = node.inputs[0 if first else 1]
    if not channel_vector(weight_type(model, constant)[1], channels, axis, rank):
        return f"the constant of {node.op} has no value per channel"
    if node.op == "Div" and first:
        return "a constant is divided by the tensor"
    value = model.weight(constant)
    assert value is not None
    k = np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,))
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Mul":
        return ChannelAffine(k, zero)
    if node.op == "Div":
        with np.errstate(divide="ignore"):
            return ChannelAffine(1 / k, zero)
    if node.op == "Add":
        return ChannelAffine(one, k)
    return ChannelAffine(-one, k) if first else ChannelAffine(one, -k)


def _neg(model: Model, node: Node, channels: int, axis: int, rank: int | None) -> ChannelAffine:
    return ChannelAffine(-np.ones(channels), np.zeros(channels))


_RULES: dict[str, Callable[[Model, Node, int, int, int | None], ChannelAffine | str]] = {
    "BatchNormalization": _batch_norm,
    "Mul": _elementwise,
    "Div": _elementwise,
    "Add": _elementwise,
    "Sub": _elementwise,
    "Neg": _neg,
}

AFFINE_OPERATORS = frozenset(_RULES)
"""Names of the operators that may scale and shift, in ONNX's own domain."""

__all__ = [
    "AFFINE_OPERATORS",
    "CARRIERS",
    "ChannelAffine",
    "affine_input",
    "carried_channels",
    "channel_affine",
    "training_mode",
]
