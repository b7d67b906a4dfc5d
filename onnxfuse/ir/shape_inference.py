"""Shape inference over a model under edit, completed by running it.

ONNX's inference reads the values of a few small integer tensors (a Reshape's target, a Slice's bounds) and
nothing but type and dims of the rest. So bulky tensors go into it without their values, which keeps it
fast and lets it work on models past protobuf's 2 GB. Where it gives up, ONNX Runtime knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
from onnx import ModelProto

from onnxfuse.ir import export
from onnxfuse.ir.nodes import Constant
from onnxfuse.ir.shapes import Dim, TensorInfo, info_of, merge

if TYPE_CHECKING:
    from onnxfuse.ir.model import Model


def infer(model: Model) -> dict[str, TensorInfo]:
    """What the file declares and ONNX shape inference finds of every tensor in the main graph."""
    stale = export.stale_names(model)
    light = export.weightless(model, stale)
    declared = {v.name: v for v in (*light.graph.value_info, *light.graph.output, *light.graph.input)}
    named = {d.dim_param for v in declared.values() for d in v.type.tensor_type.shape.dim}
    inferred = _inferred(light, named)
    result = {}
    for tensor in model.tensors():
        name = tensor.name
        if isinstance(tensor, Constant):
            result[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
        else:
            known = info_of(declared[name]) if name in declared else TensorInfo(name, None, None)
            result[name] = merge(known, inferred.get(name))
    return result


def _inferred(light: ModelProto, named: set[str]) -> dict[str, TensorInfo]:
    """What ONNX shape inference finds; nothing where it fails.

    `named` are the dynamic dimensions that the file itself names: inference has placeholders of its own
    ("unk__0"), which only say that a size is unknown and become None.
    """
    for propagate in (True, False):
        try:
            done = onnx.shape_inference.infer_shapes(light, strict_mode=False, data_prop=propagate)
            break
        except Exception:  # comes from C++ as several types; an operator it trips over only costs knowledge
            continue
    else:
        return {}
    result = {}
    for value in (*done.graph.input, *done.graph.value_info, *done.graph.output):
        info = info_of(value)
        if info.shape is not None:
            shape = tuple(None if _placeholder(d, named) else d for d in info.shape)
            info = TensorInfo(info.name, info.dtype, shape)
        result[info.name] = info
    return result


def _placeholder(dim: Dim, named: set[str]) -> bool:
    return isinstance(dim, str) and dim.startswith("unk__") and dim not in named
