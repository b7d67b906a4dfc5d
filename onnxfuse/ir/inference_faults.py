"""Nodes of which ONNX's shape inference tells other sizes than ONNX Runtime computes.

Inference lets the last window of a pooling with `ceil_mode` begin in the padding, ONNX Runtime leaves it out.
It forgets that STFT is one-sided unless told otherwise, that a ConvTranspose with `auto_pad` has no room for
`output_padding`, and the dilations of a pooling with `auto_pad`. Such sizes are taken for unknown.
"""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from onnxfuse.ir.protos import DEFAULT_DOMAINS
from onnxfuse.ir.shapes import AxisSize, Shapes

_POOLS = ("AveragePool", "LpPool", "MaxPool")


def never_known(node: NodeProto) -> bool:
    """Whether inference is not to be asked of a node at all."""
    if node.domain not in DEFAULT_DOMAINS or node.op_type not in ("STFT", "ConvTranspose", *_POOLS):
        return False
    if node.op_type == "STFT":
        return True
    if _attribute(node, "auto_pad", b"NOTSET") not in (b"SAME_UPPER", b"SAME_LOWER"):
        return False
    if node.op_type == "ConvTranspose":
        return any(_attribute(node, "output_padding", []))
    return any(step != 1 for step in _attribute(node, "dilations", []))


def is_wrong(node: NodeProto, shapes: Shapes) -> bool:
    """Whether the sizes that were inferred for a node's output are not those of ONNX Runtime.

    Args:
        node: the node.
        shapes: as they were inferred.
    """
    if (
        node.op_type not in _POOLS
        or node.domain not in DEFAULT_DOMAINS
        or not _attribute(node, "ceil_mode", 0)
    ):
        return False
    before, after = (shapes.get(name) for name in (node.input[0], node.output[0]))
    if before is None or after is None or before.shape is None or after.shape is None:
        return False
    axes = len(before.shape) - 2
    strides = _attribute(node, "strides", [1] * axes)
    pads = _attribute(node, "pads", [0] * axes)[:axes]
    rows = zip(before.shape[2:], after.shape[2:], strides, pads, strict=False)
    return any(_begins_behind(*row) for row in rows)


def _begins_behind(size: AxisSize, windows: AxisSize, stride: int, pad: int) -> bool:
    """Whether the last window begins behind the data."""
    return isinstance(size, int) and isinstance(windows, int) and (windows - 1) * stride >= size + pad


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)
