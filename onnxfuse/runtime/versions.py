"""Which versions of ONNX the installed ONNX Runtime accepts."""

import functools

from onnx import TensorProto, helper

from onnxfuse.errors import NotApplicableError


@functools.cache
def runtime_accepts(opset: int, ir_version: int) -> bool:
    """Whether ONNX Runtime accepts these versions; it offers no other way to ask than a model."""
    from onnxfuse.runtime.session import (
        Runtime,  # a session is made from a model, and a model from this check
    )

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "versions", [x], [y])
    proto = helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])
    try:
        Runtime("cpu").session(proto)
    except NotApplicableError:
        return False
    return True
