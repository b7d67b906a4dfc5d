"""Kernels of convolutions, and a border of zeros around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxfuse.analysis.normalization import CONVOLUTIONS
from onnxfuse.ir.model import Model
from onnxfuse.ir.nodes import Node, Tensor
from onnxfuse.ir.shapes import Shapes
from onnxfuse.ops.layouts import weight_type
from onnxfuse.ops.linear import LinearOp, is_main_domain, linear_op


def find_kernels(model: Model) -> dict[Tensor, list[str]]:
    """The kernel of each convolution of the main graph, with the names of all that share it."""
    found: dict[Tensor, list[str]] = {}
    for node in model.nodes:
        if node.op in CONVOLUTIONS.names and is_main_domain(node):
            found.setdefault(node.inputs[1], []).append(node.site_name)
    return found


def kernel_obstacle(model: Model, weight: Tensor, size: int, shapes: Shapes) -> str | None:
    """The reason why a kernel can't become so large; None if it can.

    Args:
        model: of the kernel.
        weight: the kernel.
        size: along every axis.
        shapes: of the model's tensors.
    """
    if not model.is_weight(weight):
        return f"the weight '{weight.name}' is computed, not constant"
    old = weight_type(model, weight)[1][2:]
    if min(old, default=size) >= size or max(old) > size:
        return f"its kernel is {_times(old)} already"
    if model.captured(weight) or model.is_output(weight):
        return f"'{weight.name}' is used outside of the main graph, too"
    for node in model.consumers(weight):
        if node.op not in CONVOLUTIONS.names or node.inputs.count(weight) > 1 or node.inputs[1] is not weight:
            return f"{node.label} uses '{weight.name}', too"
        if _pads(model, node, shapes) is None:
            return f"the pads of {node.label} depend on sizes that aren't fixed"
    return None


def _pads(model: Model, node: Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Pads, begin then end; None where they follow from a size that isn't known."""
    if node.op == "Conv":
        op = linear_op(model, node, shapes)
        return op.pads if isinstance(op, LinearOp) else None
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attrs:
        return None
    axes = len(weight_type(model, node.inputs[1])[1]) - 2
    return tuple(int(p) for p in node.attrs.get("pads", (0,) * (2 * axes)))


def enlarge(model: Model, weight: Tensor, size: int, shapes: Shapes) -> str:
    """Put zeros around a kernel and more padding at all its users; returns what was done, in words.

    Args:
        model: edited in place.
        weight: the kernel.
        size: along every axis.
        shapes: of the model's tensors.
    """
    value = model.weight(weight)
    assert value is not None
    old = value.shape[2:]
    begin = [(size - k) // 2 for k in old]
    end = [size - k - b for k, b in zip(old, begin, strict=True)]
    for node in model.consumers(weight):
        _set_pads(model, node, begin, end, shapes)
        if "kernel_shape" in node.attrs:
            node.attrs["kernel_shape"] = [size] * len(old)
    model.set_weight(weight, np.pad(value, [(0, 0), (0, 0), *zip(begin, end, strict=True)]))
    return f"kernel {_times(old)} becomes {_times([size] * len(old))}"


def _set_pads(model: Model, node: Node, begin: Sequence[int], end: Sequence[int], shapes: Shapes) -> None:
    pads = _pads(model, node, shapes)
    assert pads is not None
    dilations = [int(d) for d in node.attrs.get("dilations", [1] * len(begin))]
    more = [b * d for sides in (begin, end) for b, d in zip(sides, dilations, strict=True)]
    node.attrs["pads"] = [p + m for p, m in zip(pads, more, strict=True)]
    node.attrs.pop("auto_pad", None)


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
