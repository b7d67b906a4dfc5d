"""Operators that do nothing: the tensor that a node hands on unchanged, if there is one.

One rule for each operator (`_RULES`). A rule answers only from constants and static shapes; where it can't
tell, the node does something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxfuse.analysis.constant_folding import integers, param
from onnxfuse.ir.external_data import numpy_dtype
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import is_main_domain, optional_input

NoOpRule = Callable[[Model, Node, Shapes], Tensor | None]


def handed_on(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    """The tensor that equals the node's first output whatever is fed; None where the node does something.

    Usually one of the node's inputs; for a Squeeze that undoes an Unsqueeze, what went into that.

    Args:
        model: has the node.
        node: the node.
        shapes: of the model's tensors; only static sizes count.
    """
    rule = _RULES.get(node.op) if is_main_domain(node) else None
    return None if rule is None else rule(model, node, shapes)


def permutation(model: Model, node: Node, shapes: Shapes) -> list[int] | None:
    """A Transpose's permutation; where it isn't given the axes are reversed; None if it is unknown."""
    if "perm" in node.attrs:
        return [int(p) for p in node.attrs["perm"]]
    rank = _rank(model, node.inputs[0], shapes)
    return None if rank is None else list(reversed(range(rank)))


def _shape(model: Model, tensor: Tensor, shapes: Shapes) -> Sequence[int | str | None] | None:
    if model.is_weight(tensor):
        return weight_type(model, tensor)[1]
    info = shapes.get(tensor.name)
    return None if info is None else info.shape


def _rank(model: Model, tensor: Tensor, shapes: Shapes) -> int | None:
    shape = _shape(model, tensor, shapes)
    return None if shape is None else len(shape)


def _pinned(model: Model, tensor: Tensor) -> bool:
    return model.is_output(tensor) or model.captured(tensor)


def _always(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    return node.inputs[0]


def _dropout(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and mask.name and (mask.outputs or _pinned(model, mask)):
        return None
    mode = optional_input(node, 2)
    if mode is not None:
        value = model.weight(mode)
        if value is None or value.any():
            return None
    return node.inputs[0]


def _cast(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    x = node.inputs[0]
    info = shapes.get(x.name)
    dtype = weight_type(model, x)[0] if model.is_weight(x) else None if info is None else info.dtype
    return x if dtype is not None and dtype == numpy_dtype(int(node.attrs["to"])) else None


def _transpose(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    perm = permutation(model, node, shapes)
    return node.inputs[0] if perm is not None and perm == sorted(perm) else None


def _reshape(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    shape = _shape(model, node.inputs[0], shapes)
    target = integers(model, optional_input(node, 1))
    if shape is None or target is None or len(target) != len(shape):
        return None
    # 0 copies a size (or, with allowzero, says that it is none, which is then true); one -1 is what the other
    # sizes leave, so it equals its own if they all do.
    same = all(t in (d, 0, -1) for t, d in zip(target, shape, strict=True))
    return node.inputs[0] if same else None


def _flatten(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    axis = int(node.attrs.get("axis", 1))
    return node.inputs[0] if _rank(model, node.inputs[0], shapes) == 2 and axis in (1, -1) else None


def _squeeze(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    """Squeeze of the very axes that an Unsqueeze put in, or of nothing."""
    axes = param(model, node, 1, "axes")
    before = model.producer(node.inputs[0])
    if before is not None and before.op == "Unsqueeze" and is_main_domain(before) and axes:
        added = param(model, before, 1, "axes")
        return before.inputs[0] if added is not None and sorted(added) == sorted(axes) else None
    shape = _shape(model, node.inputs[0], shapes)
    given = "axes" in node.attrs or optional_input(node, 1) is not None
    nothing = shape is not None and not given and all(isinstance(d, int) and d != 1 for d in shape)
    return node.inputs[0] if nothing else None


def _expand(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    shape = _shape(model, node.inputs[0], shapes)
    target = integers(model, node.inputs[1])
    if shape is None or target is None or len(target) > len(shape):
        return None
    tail = shape[len(shape) - len(target) :]
    return node.inputs[0] if all(t in (1, d) for t, d in zip(target, tail, strict=True)) else None


def _tile(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    repeats = integers(model, node.inputs[1])
    return node.inputs[0] if repeats is not None and all(r == 1 for r in repeats) else None


def _pad(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    pads = param(model, node, 1, "pads")
    return node.inputs[0] if pads is not None and not any(pads) else None


def _slice(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    """A Slice that starts at 0, steps by 1 and ends behind the end."""
    shape = _shape(model, node.inputs[0], shapes)
    starts, ends = param(model, node, 1, "starts"), param(model, node, 2, "ends")
    axes = param(model, node, 3, "axes")
    steps = [1] if optional_input(node, 4) is None else integers(model, node.inputs[4])
    if starts is None or ends is None or steps is None or any(starts) or any(s != 1 for s in steps):
        return None
    if axes is None:
        if optional_input(node, 3) is not None:
            return None
        axes = list(range(len(starts)))
    sizes = [shape[a] if shape is not None else None for a in axes]
    whole = all(
        end >= (size if isinstance(size, int) else 2**31 - 1) for end, size in zip(ends, sizes, strict=True)
    )
    return node.inputs[0] if whole else None


def _single(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _pool(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
    kernel, strides, pads = (node.attrs.get(n, []) for n in ("kernel_shape", "strides", "pads"))
    indices = node.outputs[1:]
    if any(t.name and (t.outputs or _pinned(model, t)) for t in indices):
        return None
    return node.inputs[0] if {*kernel, *strides} <= {1} and not any(pads) else None


def _neutral(value: float, sides: tuple[int, ...]) -> NoOpRule:
    """x op k where every element of the constant k is `value`; k may be operand number `sides`."""

    def rule(model: Model, node: Node, shapes: Shapes) -> Tensor | None:
        for side in sides:
            constant, other = node.inputs[side], node.inputs[1 - side]
            if (
                model.is_weight(constant)
                and not model.is_weight(other)
                and not _grows(model, other, weight_type(model, constant)[1], shapes)
                and np.all(model.weight(constant) == value)
            ):
                return other
        return None

    return rule


def _grows(model: Model, tensor: Tensor, constant: tuple[int, ...], shapes: Shapes) -> bool:
    """Whether combining the tensor with a constant of that shape may give another shape than the tensor's."""
    if not constant:
        return False
    shape = _shape(model, tensor, shapes)
    if shape is None or len(constant) > len(shape):
        return True
    tail = shape[len(shape) - len(constant) :]
    return any(c not in (1, d) for c, d in zip(constant, tail, strict=True))


_RULES: dict[str, NoOpRule] = {
    "Identity": _always,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Slice": _slice,
    "Concat": _single,
    "Sum": _single,
    "Max": _single,
    "Min": _single,
    "Mean": _single,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "Add": _neutral(0, (0, 1)),
    "Sub": _neutral(0, (1,)),
    "Mul": _neutral(1, (0, 1)),
    "Div": _neutral(1, (1,)),
}

OPERATORS = tuple(_RULES)

__all__ = ["OPERATORS", "handed_on", "permutation"]
