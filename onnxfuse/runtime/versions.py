"""The versions of ONNX that the installed ONNX Runtime accepts, found by asking it."""

from __future__ import annotations

import functools

from onnx import TensorProto, helper

from onnxfuse.errors import InputError, NotApplicableError
from onnxfuse.ir.model import Model
from onnxfuse.runtime.session import Runtime


def check_runs(model: Model) -> None:
    """Refuse a model that is too new for ONNX Runtime, though onnx itself knows its versions.

    Raises:
        InputError: ONNX Runtime does not accept the model's opset or IR version.
    """
    ir_version = model.source.ir_version
    if model.opset and not runtime_accepts(model.opset, ir_version):
        what = f"'{model.path}'" if model.path else "the model"
        raise InputError(
            f"{what} (opset {model.opset}, IR version {ir_version}) is too new for the installed ONNX "
            "Runtime: upgrade onnxruntime, or export the model with an older opset"
        )


@functools.cache
def runtime_accepts(opset: int, ir_version: int) -> bool:
    """Whether ONNX Runtime accepts these versions; it offers no other way to ask than a model."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "versions", [x], [y])
    proto = helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])
    try:
        Runtime("cpu").session(proto)
    except NotApplicableError:
        return False
    return True
